"""TorchScript's archives: the state dict of the module in them.

The pickle is the tree of modules, each an object of a class that `code/` declares, with its
parameters and buffers among its attributes (torch/csrc/jit/docs/serialization.md).
"""

from __future__ import annotations

import functools
import io
import itertools
import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from attrs import evolve

from _anemoi_ckpt.formats import Archive, Names, unreadable
from _anemoi_ckpt.formats.torch_zip import check_claims, find_root, read_zip, unpack
from _anemoi_ckpt.pickles.inert import Inert
from _anemoi_ckpt.pickles.reading import StorageOf, Trust

_SCRIPT_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:  .*\n|\n)*)", re.MULTILINE)
_SCRIPT_NAMES = re.compile(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)


def is_torchscript(directory: zipfile.ZipFile) -> bool:
    """Tell whether a torch zip holds a module that TorchScript wrote."""
    return any(re.fullmatch(r"([^/]+/)?constants\.pkl", name) for name in directory.NameToInfo)


def read_torchscript(place: object, file: BinaryIO, directory: zipfile.ZipFile) -> Archive:
    """Read a module's pickle, the names of its parameters and buffers, and where storages lie.

    Raises:
        NotACheckpointError: a zip, but not torch's.
        CorruptError: a record does not fit in the file, or does not match its checksum.
    """
    archive = read_zip(place, file, directory)
    names = _script_names(_script_code(place, file, directory, find_root(place, directory)))
    assemble = functools.partial(_script_weights, archive.assemble, names)
    return evolve(archive, format="TorchScript", assemble=assemble)


def _script_code(
    place: object, file: BinaryIO, directory: zipfile.ZipFile, root: str
) -> dict[str, str]:
    """Read the code that declares the classes: torch compresses it."""
    folder = f"{root}code/"
    infos = [
        info
        for info in directory.filelist
        if info.filename.startswith(folder) and info.filename.endswith(".py")
    ]
    check_claims(place, file.seek(0, io.SEEK_END), infos)
    found = {}
    with unreadable(place, "its code"):
        for info in infos:
            text = io.BytesIO()
            unpack(directory, info, text)
            name = info.filename.removeprefix(folder).removesuffix(".py").replace("/", ".")
            found[name] = text.getvalue().decode()
    return found


def _script_names(code: Mapping[str, str]) -> dict[str, list[str]]:
    """Give what of each class is a parameter or a buffer."""
    return {
        f"{module}.{name}": re.findall(r'"([^"]*)"', ",".join(_SCRIPT_NAMES.findall(body)))
        for module, text in code.items()
        for name, body in _SCRIPT_CLASS.findall(text)
    }


_SCRIPT_MODULES = 100_000  # most modules of a module: sane ones have thousands
_SCRIPT_NESTING = 100  # most levels of them: sane ones have ten


def _script_weights(
    assemble: Any,
    known: Mapping[str, list[str]],
    storage_of: StorageOf,
    trust: Trust,  # noqa: ARG001 - its classes are code in the archive, which is never run
    names: Names,
) -> dict[str, Any]:
    """Give the state dict of a module that TorchScript wrote."""
    found: dict[str, Any] = {}
    todo: list[tuple[tuple[str, ...], Inert]] = [((), assemble(storage_of, {}, names))]
    for count in itertools.count():
        if not todo:
            return found
        path, module = todo.pop()
        if count > _SCRIPT_MODULES or len(path) > _SCRIPT_NESTING:
            raise ValueError("its modules hold each other without end")
        state = module._inert_state  # noqa: SLF001 - as written
        for name in known[module.inert_class]:
            if isinstance(state[name], torch.Tensor):  # a buffer can be None
                found[".".join((*path, name))] = state[name].detach()
        todo += reversed(
            [
                ((*path, name), each)
                for name, each in state.items()
                if isinstance(each, Inert) and each.inert_class in known
            ]
        )
    raise AssertionError
