"""Fixtures: `place` (all five kinds of place), the servers behind it, an environment of our own.

`pytest --cloud-tests` adds real clouds to `place`, for every environment variable that is set:
ANEMOI_CKPT_TEST_S3, ANEMOI_CKPT_TEST_GCS and ANEMOI_CKPT_TEST_AZURE (URI prefixes to write below,
with your own credentials) and ANEMOI_CKPT_TEST_HTTP (the URL of one file; make it with
`python tests/checkpoints.py FILE`, upload it, and only the test of that file runs).
"""

import contextlib
import itertools
import os
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import attrs
import hypothesis
import pytest

import needs
import servers

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when it is imported, as tests are collected

# No deadline for an example, nor for drawing it: a busy machine takes as long as it takes.
# Fixtures of a function are fine where each example writes its file over the last one's.
hypothesis.settings.register_profile(
    "patient",
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("patient")

KINDS = ("local", "http", "s3", "gcs", "azure")

# Whatever could lead a test to the tester's own clouds, or through a proxy.
_FOREIGN = (
    "AWS_",
    "AZURE_",
    "BOTO_",
    "CLOUDSDK_",
    "GCE_",
    "GCLOUD_",
    "GOOGLE_",
    "IDENTITY_",
    "MSI_",
)
_FOREIGN_NAMES = ("ANEMOI_CKPT_CACHE", "NETRC", "NO_GCE_CHECK", "STORAGE_EMULATOR_HOST")
# No SDK asks a metadata service for credentials: on a laptop that takes seconds to time out.
_NO_METADATA = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_GCE_CHECK": "true",
    "GCE_METADATA_HOST": "127.0.0.1:1",
    "GCE_METADATA_IP": "127.0.0.1:1",
    "GCE_METADATA_TIMEOUT": "1",
    "AZURE_POD_IDENTITY_AUTHORITY_HOST": "http://127.0.0.1:1",
}
_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--cloud-tests`."""
    parser.addoption(
        "--cloud-tests",
        action="store_true",
        help="run the tests of places on real clouds too: ANEMOI_CKPT_TEST_{HTTP,S3,GCS,AZURE}",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuses `--cloud-tests` without a cloud: nothing would be tested, silently."""
    # What torch 2.14 says where a test compares with its own `torch.load`.
    config.addinivalue_line("filterwarnings", "ignore:Validating sparse tensor:UserWarning")
    if config.getoption("--cloud-tests") and not servers.cloud_stores():
        raise pytest.UsageError(
            "--cloud-tests needs at least one of ANEMOI_CKPT_TEST_S3, ANEMOI_CKPT_TEST_GCS, "
            "ANEMOI_CKPT_TEST_AZURE (URI prefixes to write below) or ANEMOI_CKPT_TEST_HTTP (a URL)"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that asks for `place` once in each; its own parametrize mark comes first."""
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "place" in metafunc.fixturenames and not any("place" in names for names in chosen):
        clouds = servers.cloud_stores() if metafunc.config.getoption("--cloud-tests") else {}
        kinds = [*KINDS, *(f"cloud-{kind}" for kind in clouds)]
        metafunc.parametrize("place", kinds, indirect=True)


# ---------------------------------------------------------------------------------- the environment


@pytest.fixture(autouse=True, scope="session")
def _bare_environment() -> Iterator[None]:
    """Nothing of the tester's own clouds, proxies and metadata services reaches a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            proxy = name.lower().endswith("_proxy")
            if name.startswith(_FOREIGN) or name in _FOREIGN_NAMES or proxy:
                patch.delenv(name)
        for name, value in _NO_METADATA.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(autouse=True)
def _own_home(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """`~` is an empty folder: no ~/.aws, ~/.netrc, ~/.config/gcloud, and a cache of its own."""
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(home / "gcloud"))
    monkeypatch.setenv("ANEMOI_CKPT_CACHE", str(home / "cache"))
    yield
    shutil.rmtree(home, ignore_errors=True)


def _testers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes both of the above, for a test against a real cloud."""
    for name in set(os.environ) - set(servers.HOST_ENVIRONMENT):
        if name != "PYTEST_CURRENT_TEST":  # pytest's own, and it takes it out again
            monkeypatch.delenv(name)
    for name, value in servers.HOST_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


# -------------------------------------------------------------------------------------- the servers


def _running(
    kind: str, start: Callable[[], AbstractContextManager[servers.Store]]
) -> Iterator[servers.Store]:
    """Starts a server for the session.  Where it cannot: a failure in CI, else a skip."""
    with contextlib.ExitStack() as stack:
        try:
            store = stack.enter_context(start())
        except servers.UnavailableError as err:
            needs.give_up(kind, err, str(err))
        yield store


@pytest.fixture(scope="session")
def http_store() -> Iterator[servers.Store]:
    """Our own HTTP server."""
    yield from _running("http", servers.http_store)


@pytest.fixture(scope="session")
def s3_store() -> Iterator[servers.Store]:
    """S3, by moto."""
    yield from _running("s3", servers.s3_store)


@pytest.fixture(scope="session")
def gcs_store() -> Iterator[servers.Store]:
    """Google Cloud Storage, by gcp-storage-emulator."""
    yield from _running("gcs", servers.gcs_store)


@pytest.fixture(scope="session")
def azure_store() -> Iterator[servers.Store]:
    """Azure Blob Storage, by Azurite."""
    yield from _running("azure", servers.azure_store)


@pytest.fixture
def http_server(http_store: servers.Store) -> Iterator[servers.HTTPServer]:
    """Our own HTTP server, with an empty log and no faults."""
    server = http_store.server
    assert isinstance(server, servers.HTTPServer)
    server.reset()
    yield server
    server.reset()


@contextlib.contextmanager
def _reached(store: servers.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Store]:
    """Readers reach the store by their environment; its server has an empty log and no faults."""
    if store.server is not None:
        store.server.reset()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    yield store
    if store.server is not None:
        store.server.reset()


@pytest.fixture
def s3(s3_store: servers.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Store]:
    """S3, as readers reach it."""
    with _reached(s3_store, monkeypatch) as store:
        yield store


@pytest.fixture
def gcs(gcs_store: servers.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Store]:
    """Google Cloud Storage, as readers reach it."""
    with _reached(gcs_store, monkeypatch) as store:
        yield store


@pytest.fixture
def azure(azure_store: servers.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Store]:
    """Azure Blob Storage, as readers reach it."""
    with _reached(azure_store, monkeypatch) as store:
        yield store


# ---------------------------------------------------------------------------------------- the place


@attrs.define
class Place:
    """Where a test puts a checkpoint for the code under test to read.

    Names are the test's own: two tests that put `last.ckpt` do not meet.
    """

    store: servers.Store
    cloud: bool
    _monkeypatch: pytest.MonkeyPatch
    _folder: str = attrs.field(factory=lambda: f"test-{os.getpid()}-{next(_numbers)}")
    _names: dict[str, str] = attrs.field(factory=dict)
    """From the URIs that were given out to names."""

    @property
    def kind(self) -> str:
        """`local`, `http`, `s3`, `gcs` or `azure`; the same for a real cloud."""
        return self.store.kind

    @property
    def server(self) -> servers.Server | None:
        """The server or proxy that readers reach the place through: `log`, `bytes_sent`, `faults`.

        None for local files and real clouds.
        """
        return self.store.server

    def put(self, name: str, data: bytes) -> str:
        """Stores an object; gives its URI's text."""
        return self._put(f"{self._folder}/{name}", data)

    def replace(self, uri: str, data: bytes) -> None:
        """Stores other bytes under the URI that `put` gave."""
        self._write(self._names[uri], data)

    def missing(self) -> str:
        """The URI of an object that is not there, in a bucket that is."""
        uri = self.store.uri(f"{self._folder}/missing.ckpt")
        if self.cloud and self.kind == "http":  # where the one URL there is names a file
            parts = urllib.parse.urlsplit(uri)
            return parts._replace(path=f"{parts.path}-missing").geturl()
        return uri

    def denied(self) -> str | None:
        """The URI of an object that is there and must not be read.

        None where there is no such thing: local files of root, real clouds.
        """
        if self.cloud:
            return None
        if self.kind == "local":
            return self._locked_file()
        uri = self._put(f"{self.store.denied_prefix or ''}{self._folder}/denied.ckpt", b"secret")
        if self.server is not None and self.store.denied_prefix is None:
            self.server.deny(f"{self._folder}/denied.ckpt")
        return uri

    def unreachable(self) -> str | None:
        """From here on nothing listens where the place was; gives a URI there.

        None for local files.
        """
        if self.kind == "local":
            return None
        if self.server is not None:
            self.server.stop()
        elif self.kind == "http":
            return f"http://127.0.0.1:{servers.free_port()}/unreachable.ckpt"
        for name, value in self.store.nowhere.items():
            self._monkeypatch.setenv(name, value)
        return self.store.uri(f"{self._folder}/unreachable.ckpt")

    def clean(self) -> None:
        """Removes what was put."""
        for name in self._names.values():
            self.store.remove(name)

    def _put(self, name: str, data: bytes) -> str:
        self._write(name, data)
        uri = self.store.uri(name)
        self._names[uri] = name
        return uri

    def _write(self, name: str, data: bytes) -> None:
        try:
            self.store.write(name, data)
        except servers.UnavailableError as err:  # a real HTTP place holds another file
            pytest.skip(str(err))

    def _locked_file(self) -> str | None:
        uri = self.put("denied.ckpt", b"secret")
        Path(uri).chmod(0)
        return None if os.access(uri, os.R_OK) else uri


def _local_store(folder: Path) -> servers.Store:
    def write(name: str, data: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return servers.Store(kind="local", uri=lambda name: str(folder / name), write=write)


@pytest.fixture
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """One of the five kinds of place; a test that asks for it runs in each."""
    cloud, _, kind = request.param.rpartition("-")
    if cloud:
        _testers_environment(monkeypatch)
        store = servers.cloud_store(kind, servers.cloud_stores()[kind])
    elif kind == "local":
        store = _local_store(tmp_path)
    else:
        store = request.getfixturevalue(f"{kind}_store")
    with _reached(store, monkeypatch):
        place = Place(store, bool(cloud), monkeypatch)
        yield place
    place.clean()
