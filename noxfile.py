"""What the tests run in: Python, torch and all else, from the oldest to the newest.

`nox -l` lists the sessions, `nox -s debian-sid` runs one, `nox -s pinned -- tests/test_load.py` a
part of one.  `.ci/run` runs those that cost no gigabytes.  torch from PyPI is a CUDA build of some:
run the other sessions when something that depends on torch has changed, and before a release.
"""

import json
import os
import re
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["pinned"]
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
CI = os.environ.get("CI") == "true"


CHROMIUM = "chromium"  # whose install takes a minute, for one test; where it is, that runs
AT_ONCE = ["-n", "2", "--dist", "loadfile"]  # many tests wait for a server


def run_tests(session: nox.Session, *arguments: str) -> None:
    """Run the tests that were chosen behind `--`, or all."""
    session.run("python", "-c", SAY_VERSIONS)
    without = session.env.get("ANEMOI_CKPT_TESTS_WITHOUT", "")
    session.env["ANEMOI_CKPT_TESTS_WITHOUT"] = f"{without},{CHROMIUM}"
    session.env["OMP_NUM_THREADS"] = "1"  # other sessions and other tests want the cores, too
    session.run("pytest", *arguments, *session.posargs)


SAY_VERSIONS = (
    "import sys, numpy, torch; print(f'Python {sys.version.split()[0]}, '"
    "f'torch {torch.__version__}, numpy {numpy.__version__}')"
)

# ── what README says ──────────────────────────────────────────────────────────────────────────


@nox.session(python="3.11")
def pinned(session: nox.Session) -> None:
    """Python 3.11 and the versions in constraints.txt, every branch covered."""
    session.install("-c", "constraints.txt", "-e", ".[test,anemoi]")
    whole = [] if session.posargs else [*AT_ONCE, "--cov"]
    run_tests(session, *whole)
    if whole:
        # Today's models: their bounds want an older torch, but they run with this one. The tests
        # before build models of anemoi-models 0.13, so these come last.
        session.install("--no-deps", "anemoi-models==0.19.0", "anemoi-graphs==0.9.8")
        covered = ["--cov", "--cov-append", "--cov-fail-under=100"]
        session.run("pytest", "-n", "2", *covered, "tests/test_anemoi_019.py")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """Build the pages of docs: each warning is an error."""
    session.install("-c", "constraints.txt", "mkdocs-material", "mkdocstrings[python]", "ruff")
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    session.run("mkdocs", "build", "--quiet", "--site-dir", str(Path(session.create_tmp(), "site")))


# ── what costs some gigabytes ─────────────────────────────────────────────────────────────────


@nox.session(name="torch-2.2", python="3.11")
def torch_2_2(session: nox.Session) -> None:
    """Python 3.11, torch 2.2 and all else that is needed at its lowest bound."""
    session.install("-c", "constraints-lowest.txt", "-e", ".[test]")
    session.env["ANEMOI_CKPT_TESTS_WITHOUT"] = "anemoi"  # anemoi-models wants torch 2.5
    run_tests(session)


@nox.session(python="3.11")
def anemoi(session: nox.Session) -> None:
    """Python 3.11 and what anemoi-training 0.17.1 is used with: nothing of that is replaced."""
    # The SDKs of the tests want an older dateutil than the newest, which would be replaced.
    session.install(
        *("torch==2.10.0", "torchvision==0.25.0", "anemoi-training==0.17.1", "python-dateutil<3")
    )
    versions = Path(session.create_tmp(), "versions.txt")
    versions.write_text(output_of(session, "freeze"))
    planned = output_of(session, "install", "--dry-run", "--quiet", "--report", "-", "-e", ".")
    installed = [line.split("==")[0] for line in versions.read_text().splitlines()]
    wanted = [package["metadata"]["name"] for package in json.loads(planned)["install"]]
    if replaced := normal(wanted) & normal(installed):
        session.error(f"to install anemoi-ckpt would replace {', '.join(sorted(replaced))}")
    session.install("-c", str(versions), "-e", ".[test]")
    # these tests build models of 0.13, as in constraints.txt; test_anemoi_019.py those of 0.19
    session.env["ANEMOI_CKPT_TESTS_WITHOUT"] = "anemoi"
    run_tests(session)


def output_of(session: nox.Session, *command: str) -> str:
    """Tell what pip says in answer to a command."""
    return session.run("python", "-m", "pip", *command, silent=True, stderr=None)


def normal(names: list[str]) -> set[str]:
    """Write names of packages as PEP 503 has it: the same package, the same name."""
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


@nox.session(python="3.12")
def newest(session: nox.Session) -> None:
    """Python 3.12 and the newest of all, torch included, whatever the machine's pip is told."""
    session.install("--upgrade", "-e", ".[test]", env={"PIP_CONFIG_FILE": os.devnull})
    session.env["ANEMOI_CKPT_TESTS_WITHOUT"] = "anemoi"  # the newest torch is too new for it
    run_tests(session)


# ── Debian, whose torch is built for CPUs ─────────────────────────────────────────────────────


@nox.session(name="debian-trixie", venv_backend="none")
def debian_trixie(session: nox.Session) -> None:
    """Python 3.13, torch 2.6, numpy 2.2, and the rest of a year or two ago; as root."""
    debian(session, "trixie", "smart-open[zst,lz4]==8.0.0", "zlib-ng")


@nox.session(name="debian-sid", venv_backend="none")
def debian_sid(session: nox.Session) -> None:
    """Python 3.14, torch 2.14 or newer, and the rest of today; as root."""
    debian(session, "sid", "smart-open[zst,lz4]", "zlib-ng")


CANNOT = 77  # exit status of .ci/setup_debian.sh
VENV = "/venv"  # what Debian does not have, or has too old; .ci/in_debian.sh looks there first
TEST_PACKAGES = [
    *("google-crc32c", "hydra-core", "hypothesis", "ipykernel", "moto[s3,server]", "nbclient"),
    *("lightning-utilities", "omegaconf", "pyftpdlib", "setuptools"),
]
LIGHTNING = ["lightning", "pytorch-lightning", "torchmetrics"]  # they would bring a torch of PyPI
WITHOUT = [
    "anemoi",  # anemoi-models wants some dozens of packages, and another torch
    # HTTP and S3 tell whether Python and requests are borne; torch-2.2 has the SDKs' lowest bounds.
    *("azure", "gcs", "google", "node"),
    CHROMIUM,
    "distributed",  # Dask's workers are of an example, and know nothing of torch
    "mypy",  # what it says of a wheel is no matter of the Python or torch beneath
    "mlflow",  # a hundred packages for a client that knows nothing of torch
]
# Tests of stores, of their servers and of packages, for which the Python and the torch beneath are
# all the same; test_places.py, test_params.py and test_interrupts.py tell whether HTTP is borne.
STORES = [
    *("coding", "download", "faults", "faults_writing", "finding", "foreign_servers", "ftp_hdfs"),
    *("hubs", "listing", "offline", "openssh", "packaging", "secrets", "settings", "sftp"),
    "writing",
]
NO_MKL = "sums of sparse tensors want MKL: Debian builds without it"
DESELECTED = {
    "tests/test_ranks.py::test_four_processes": "torchrun wants libuv: Debian builds without it",
    "tests/test_strategies.py::test_awkward_tensors_pass_through[averaged]": NO_MKL,
    "tests/test_strategies.py::test_awkward_tensors_pass_through[lifted0]": NO_MKL,
}


def debian(session: nox.Session, suite: str, *packages: str) -> None:
    """Run the tests that Debian's packages allow, in a Debian of its own in a folder.

    The folder is made where there is none: in `.nox`, or in DEBIAN_FOLDERS.
    """
    folder = Path(os.environ.get("DEBIAN_FOLDERS", ROOT / ".nox"), suite)
    setup = [ROOT / ".ci/setup_debian.sh", suite, folder]
    session.run(*setup, external=True, success_codes=[0, CANNOT])
    if not (folder / "finished").exists():
        (session.error if CI else session.skip)("there can be no such Debian here, see above")

    def run(*command: str) -> None:
        session.run(ROOT / ".ci/in_debian.sh", folder, *command, external=True)

    pip = ["pip", "install", "-q", "--root-user-action=ignore"]
    run("/usr/bin/python3", "-m", "venv", "--clear", "--system-site-packages", VENV)
    run(*pip, *packages, *TEST_PACKAGES)
    run(*pip, "--no-deps", *LIGHTNING)
    copy_sources(session, folder / "src")
    run(*pip, "--no-deps", "--no-build-isolation", "-e", "/src")
    for reason in DESELECTED.items():
        session.log("without %s: %s", *reason)
    deselected = [f"--deselect={test}" for test in DESELECTED]
    session.env["ANEMOI_CKPT_TESTS_WITHOUT"] = ",".join(WITHOUT)
    ignored = [] if session.posargs else [f"--ignore=tests/test_{name}.py" for name in STORES]
    tests = ["python", "-m", "pytest", *deselected, *ignored, *session.posargs]
    run("sh", "-c", 'cd /src && "$@"', "sh", *tests)


def copy_sources(session: nox.Session, folder: Path) -> None:
    """Copy what git knows, and what it would be told of: no caches, nothing that was built."""
    options = ["-z", "--cached", "--others", "--exclude-standard"]
    names = session.run("git", "ls-files", *options, external=True, silent=True, stderr=None)
    shutil.rmtree(folder, ignore_errors=True)
    for name in names.rstrip("\0").split("\0"):
        if (ROOT / name).exists():  # or it was removed, and git not told yet
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
