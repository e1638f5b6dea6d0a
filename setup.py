"""What pyproject.toml cannot say: type checkers see the types of our single modules.

PEP 561 has a marker for packages (`_anemoi_ckpt/py.typed`) and none for single modules, whose types
are taken from stub packages. A module with annotations is its own stub: a wheel has copies of both
modules, and an editable install has links in the checkout, so that none goes stale.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

STUBS = {
    "anemoi_ckpt-stubs/__init__.pyi": "anemoi_ckpt.py",
    "anemoi_ckpt-stubs/strategies.pyi": "strategies.py",  # not the user's own, if there is one
    "strategies-stubs/__init__.pyi": "strategies.py",
}


class BuildWithStubs(build_py):
    """Build the modules, and their stubs."""

    def run(self) -> None:
        """Build the modules, and their stubs: beside them, or in the checkout they are linked."""
        super().run()
        folder = Path() if self.editable_mode else Path(self.build_lib)
        for stub, module in STUBS.items():
            target = folder / stub
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
            if not self.editable_mode:
                target.write_bytes(Path(module).read_bytes())
            else:
                try:
                    target.symlink_to(Path("..", module))
                except OSError:  # Windows may refuse to make links
                    target.write_bytes(Path(module).read_bytes())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Name the stubs too, so that they are known as built."""
        stubs = [] if self.editable_mode else [str(Path(self.build_lib, stub)) for stub in STUBS]
        return [*super().get_outputs(include_bytecode), *stubs]


setup(cmdclass={"build_py": BuildWithStubs})
