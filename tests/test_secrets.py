"""Each kind of secret, each way to succeed or fail: it is shown nowhere, and told to no other."""

import base64
import io
import logging
import os
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs
import pytest
import requests
import torch
from torch import nn

import _anemoi_ckpt.cache
import _anemoi_ckpt.downloading
import _anemoi_ckpt.progress
import _anemoi_ckpt.transport
import servers
from _anemoi_ckpt.errors import redact
from anemoi_ckpt import (
    CheckpointError,
    InvalidURIError,
    download,
    load,
    load_into,
    main,
    metadata,
    parse_uri,
    peek,
    save,
)
from checkpoints import as_bytes
from servers import Fault

SECRET = "hunter2+Zm/9q=="  # with what is written otherwise in a URL
QUOTED = "hunter2%2BZm%2F9q%3D%3D"
KEY = re.search("AccountKey=(.*?);", servers.azurite_connection_string(""))[1]  # type: ignore[index] # the key is in the emulator's connection string
SHOWN = re.compile(
    "|".join(
        re.escape(secret.strip("="))
        for plain in (SECRET, QUOTED, KEY)
        for secret in (plain, base64.b64encode(f"me:{plain}".encode()).decode())
    )
    + "|hunter2"
)
DATA = as_bytes(
    {"state_dict": {"weight": torch.rand(300, 400), "bias": torch.rand(300)}, "epoch": 3}
)


# ── secrets ───────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Case:
    """How a secret is given: in the URI's text, in the parameters, or in the environment."""

    kind: str = "http"
    text: Callable[[str], str] = lambda uri: uri
    params: dict[str, Any] | None = None
    environment: dict[str, str] = attrs.field(factory=dict)


def query(text: str) -> Case:
    return Case(text=lambda uri: f"{uri}?{text}")


def user(text: str) -> Case:
    return Case(text=lambda uri: uri.replace("://", f"://{text}@"))


def signed_in(session: requests.Session) -> requests.Session:
    session.auth = ("me", SECRET)
    return session


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRET}"}


CASES = {
    "an S3 URL that is signed": query(
        f"X-Amz-Algorithm=AWS4&X-Amz-Credential={QUOTED}&X-Amz-Security-Token={QUOTED}"
        f"&X-Amz-Signature={QUOTED}"
    ),
    "an S3 URL that is signed the old way": query(f"AWSAccessKeyId=A&Signature={QUOTED}&Expires=1"),
    "a GCS URL that is signed": query(f"X-Goog-Credential={QUOTED}&X-Goog-Signature={QUOTED}"),
    "an Azure URL that is signed": query(f"sv=2024&sr=b&sig={QUOTED}"),
    "a token in the query": query(f"token={QUOTED}"),
    "an access token in the query": query(f"download=1&access_token={SECRET}"),
    "a key in the query": query(f"api_key={SECRET}&apikey={SECRET}&key={SECRET}"),
    "a password in the query": query(f"user=me&password={SECRET}&secret={SECRET}&pwd={SECRET}"),
    "a URL in the query": query(f"to=https%3A%2F%2Fhost%2Fa%3Fsig%3D{QUOTED}"),
    "a token in the fragment": Case(text=lambda uri: f"{uri}#access_token={QUOTED}"),
    "a password in the URL": user(f"me:{QUOTED}"),
    "a password in the URL, as it is": user("me:hunter2+Zm"),
    "a token as the user": user(QUOTED),
    "a header": Case(params={"headers": bearer()}),
    "a header that says Basic": Case(
        params={
            "headers": {
                "authorization": "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
            }
        }
    ),
    "a header that is none": Case(params={"headers": {"Authorization": f"Bearer {SECRET}\n"}}),
    "another header": Case(params={"headers": {"X-Auth-Token": SECRET, "PRIVATE-TOKEN": SECRET}}),
    "a header that is none, by another name": Case(params={"headers": {"X-Key": f"{SECRET}\n"}}),
    "a user and password": Case(params={"user": "me", "password": SECRET}),
    "a session": Case(params={"session": signed_in(requests.Session())}),
    "keys of S3": Case(
        "s3",
        environment={
            "AWS_ACCESS_KEY_ID": f"AKIA{QUOTED}",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_SESSION_TOKEN": SECRET,
        },
    ),
    "keys in Anemoi's settings": Case(
        "s3",
        environment={
            "ANEMOI_SETTINGS_OBJECT_STORAGE__ACCESS_KEY_ID": f"AKIA{QUOTED}",
            "ANEMOI_SETTINGS_OBJECT_STORAGE__SECRET_ACCESS_KEY": SECRET,
        },
    ),
    "keys in an S3 URI": Case("s3", lambda uri: uri.replace("://", f"://AKIA:{SECRET}@")),
    "a connection string": Case("azure"),  # Azurite's own
    "a connection string that is none": Case(
        "azure", environment={"AZURE_STORAGE_CONNECTION_STRING": f"AccountKey={SECRET}"}
    ),
    "a SAS in an az URI": Case("azure", lambda uri: f"{uri}?sv=2024&sig={QUOTED}"),
}


# ── ways ──────────────────────────────────────────────────────────────────────────────────────


def silence(server: Any) -> None:
    server.fault = lambda request: Fault(delay=0.1)


def fails(**fault: Any) -> Callable[[Any], None]:
    def begin(server: Any) -> None:
        server.fault = lambda request: Fault(**fault)

    return begin


WRONGS: dict[str, Callable[[Any], None]] = {
    "nothing": lambda server: None,
    "401": fails(status=401),
    "403": fails(status=403),
    "404": fails(status=404),
    "500": fails(status=500),
    "reset": fails(reset=True),
    "silence": silence,
    "cut": fails(cut=0),
    "ranges ignored": fails(ignore_range=True),
    "ranges ignored, and cut": fails(ignore_range=True, cut=1000),
    "a page": lambda server: setattr(server, "fault", lambda request: servers.html_page()),
    "flipped": fails(flip=8 * 20_000),
    "gone": lambda server: server.stop(),
    "redirected to nowhere": fails(
        status=302, headers={"Location": f"http://127.0.0.1:1/a?sig={QUOTED}"}
    ),
    "redirected in a circle": fails(status=302, headers={"Location": f"?sig={QUOTED}"}),
    "redirected to nonsense": fails(status=302, headers={"Location": f"http://[?sig={QUOTED}"}),
}


def ways(uri: str, folder: Path, params: Any) -> Iterator[Callable[[], Any]]:
    """All that takes a place; each gives what is then shown, in all the ways to show it."""
    options: dict[str, Any] = {"transport_params": params, "retries": 1, "timeout": 0.2}
    shown = {**options, "progress": True}
    model = nn.Linear(400, 300)
    yield lambda: load(uri, **shown) and None
    yield lambda: load(uri, cached=True, **shown) and None
    yield lambda: load_into(model, uri, **shown)
    yield lambda: load_into(nn.Linear(3, 4), uri, **options)
    yield lambda: load(uri, lambda checkpoint: checkpoint["nothing"], **options)
    yield lambda: peek(uri, **options)
    yield lambda: metadata(uri, **options)
    yield lambda: download(uri, folder / "a.ckpt", **shown)
    yield lambda: download(uri, folder / "a.ckpt", sha256="00" * 32, resume=False, **options)
    if params is None:
        for command in (["peek", uri], ["metadata", uri], ["copy", uri, str(folder / "b.ckpt")]):
            yield lambda command=command: main(command)  # type: ignore[misc] # mypy cannot infer a lambda with a default
    yield lambda: main(["cache"])


def told(way: Callable[[], Any]) -> Iterator[str]:
    """Give all that a way shows: its output, its result, its error."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        try:
            result = way()
        except (CheckpointError, KeyError) as err:
            yield "".join(traceback.format_exception(err))
            yield f"{err} {err!r} {getattr(err, '__notes__', '')} {vars(err)}"
            yield from map(str, (getattr(err, "place", ""), getattr(err, "filename", "")))
            result = err
    yield f"{result} {result!r} {getattr(result, '_repr_html_', str)()}"
    yield output.getvalue()
    buffer = io.BytesIO()
    WithCauses(buffer).dump(result)
    yield buffer.getvalue().decode("latin-1")


class WithCauses(pickle.Pickler):
    """Pickles an error with its causes and all that they hold, as Dask does."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, BaseException):
            chain = (value.__cause__, value.__context__)
            return list, ([*value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)[1:], *chain],)
        return (str, ()) if isinstance(value, TracebackType) else NotImplemented


USUAL = {"nothing", "403", "ranges ignored", "gone"}
THOROUGHLY = {"an Azure URL that is signed", "a password in the URL", "a header that is none"}
CELLS = [
    (secret, wrong)
    for secret in CASES
    for wrong in WRONGS
    if wrong in USUAL or secret in THOROUGHLY
]


@pytest.mark.parametrize(("secret", "wrong"), CELLS)
def test_a_secret_is_shown_nowhere(  # noqa: PLR0913, PLR0917 - fixtures
    secret: str,
    wrong: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = CASES[secret]
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    store = request.getfixturevalue(case.kind if case.kind != "http" else "http_store")
    store.server.reset()
    store.write("secrets/a.ckpt", DATA)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    uri = case.text(store.uri("secrets/a.ckpt"))
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "anemoi_ckpt")
    WRONGS[wrong](store.server)
    shown = []
    try:
        for way in ways(uri, tmp_path, case.params):
            shown.extend(told(way))
        if wrong in {"nothing", "403"}:  # SDKs try to write for minutes
            shown.extend(told(lambda: save({}, uri, transport_params=case.params) and None))
    finally:
        store.server.reset()
    with suppress(InvalidURIError):
        shown.append(repr(parse_uri(uri)))
        transport = _anemoi_ckpt.transport.Transport(case.params)
        shown.append(repr(_anemoi_ckpt.downloading.Transfer(parse_uri(uri), transport, None)))
    shown.append(caplog.text)
    for path in tmp_path.rglob("*"):  # the cache, too
        shown.append(str(path))
        if path.is_file() and path.suffix != ".ckpt" and not path.name.endswith(".part"):
            shown.append(path.read_text("utf-8"))
    assert len(shown) > 30
    for text in shown:
        found = SHOWN.search(text)
        assert found is None, text[max(0, found.start() - 300) :][:400]


@pytest.mark.timeout(60)  # milliseconds, or, squared in its length, many minutes
@pytest.mark.parametrize(
    "part", ["key", "key.", "a.", "a://", "a://b:c", "http://a:b", "sig-", ":"]
)
def test_what_a_hostile_file_says_is_looked_through_at_once(part: str) -> None:
    assert redact(part * 100_000) == part * 100_000


# ── redirects ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def other() -> Iterator[servers.HTTPServer]:
    """Another host: there is one to each port."""
    server = servers.HTTPServer()
    server.start()
    yield server
    server.close()


@pytest.mark.parametrize("ranged", [True, False])
@pytest.mark.parametrize("secret", [name for name in CASES if "header" in name or "pass" in name])
def test_authorization_goes_to_no_other_host(
    secret: str,
    ranged: bool,
    http_server: servers.HTTPServer,
    other: servers.HTTPServer,
) -> None:
    case = CASES[secret]
    url = other.put("a.ckpt", DATA)
    http_server.fault = lambda request: servers.redirect(url)
    if not ranged:
        other.fault = lambda request: Fault(ignore_range=True)
    with suppress(CheckpointError):  # a header that is none
        load(case.text(http_server.put("a.ckpt", DATA)), transport_params=case.params)
        assert other.log
    assert not any(request.headers["Authorization"] for request in other.log)


def test_a_password_of_netrc_goes_to_no_other_host(
    http_server: servers.HTTPServer, other: servers.HTTPServer
) -> None:
    netrc = Path(os.environ["HOME"]) / ".netrc"
    netrc.write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    netrc.chmod(0o600)
    url = other.put("a.ckpt", DATA).replace("127.0.0.1", "localhost")
    http_server.fault = lambda request: servers.redirect(url)
    load(http_server.put("a.ckpt", DATA))
    assert all(request.headers["Authorization"] for request in http_server.log)
    assert other.log
    assert not any(request.headers["Authorization"] for request in other.log)


@pytest.mark.parametrize("kind", ["s3", "gcs", "azure"])
def test_a_stores_authorization_goes_to_no_other_host(
    kind: str,
    other: servers.HTTPServer,
    request: pytest.FixtureRequest,
) -> None:
    store = request.getfixturevalue(kind)
    params = None
    if kind == "gcs":
        from google.cloud import storage
        from google.oauth2.credentials import Credentials

        client = storage.Client("testing", Credentials(SECRET))
        params = {"client": client}
    store.write("secrets/a.ckpt", DATA)
    url = other.put("a.ckpt", DATA)
    store.server.fault = lambda request: servers.redirect(url, 307)
    with suppress(CheckpointError):  # it is no store
        load(store.uri("secrets/a.ckpt"), transport_params=params, retries=0)
    assert any(each.headers["Authorization"] for each in store.server.log)
    assert not any(each.headers["Authorization"] for each in other.log)
