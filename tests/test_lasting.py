"""What another attempt cannot mend is told at once; what is missing is named."""

import datetime as dt
import errno
import http.server
import ipaddress
import logging
import os
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import _anemoi_ckpt.places.local
import _anemoi_ckpt.transport
import needs
import servers
from _anemoi_ckpt.places import Buffers
from _anemoi_ckpt.places.explained import explain
from anemoi_ckpt import (
    CheckpointNotFoundError,
    UnreachableError,
    download,
    load,
    parse_uri,
    peek,
    save,
    verify,
)
from checkpoints import as_bytes, assert_same
from conftest import Place

# ssl leaves a server's socket open whose client went before its handshake.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")

DATA = as_bytes({"w": torch.ones(3)})


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Say nothing of a client that does not trust it."""


def certificate(folder: Path) -> Path:
    """Writes a certificate of 127.0.0.1 that it signed itself, and its key."""
    x509 = needs.package("cryptography.x509", "pip install cryptography")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / "server.pem"
    path.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, pkcs8, plain))
    return path


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls(pem: Path) -> Iterator[str]:
    """A server that speaks TLS; gives its host and port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with _Quiet(("127.0.0.1", 0), _Handler) as server:
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def told_at_once(uri: str, said: str, caplog: pytest.LogCaptureFixture, **options: Any) -> None:
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, "anemoi_ckpt"),
        pytest.raises(UnreachableError, match=said),
    ):
        load(uri, **options)
    assert [each for each in caplog.records if "attempt" in each.getMessage()] == []


def test_a_certificate_that_nobody_trusts(
    tls: str, pem: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"https://{tls}/a.ckpt"
    told_at_once(uri, "REQUESTS_CA_BUNDLE", caplog)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem))
    assert load(uri)["w"].tolist() == [1, 1, 1]


def test_a_certificate_that_s3_does_not_trust(
    tls: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://{tls}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    told_at_once("s3://bucket/a.ckpt", "AWS_CA_BUNDLE", caplog)


@pytest.mark.parametrize("kind", ["https", "s3"])
def test_a_file_of_certificates_that_is_not_there(
    kind: str, tls: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://{tls}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/none/bundle.pem")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/none/bundle.pem")
    uri = {"https": f"https://{tls}/a.ckpt", "s3": "s3://bucket/a.ckpt"}[kind]
    told_at_once(uri, "_CA_BUNDLE", caplog)


def test_a_server_that_does_not_speak_tls(
    http_server: servers.HTTPServer, caplog: pytest.LogCaptureFixture
) -> None:
    uri = http_server.put("a.ckpt", DATA).replace("http://", "https://")
    told_at_once(uri, "does not speak TLS", caplog)


@pytest.mark.parametrize("place", ["s3", "azure"], indirect=True)  # GCS's emulator tells neither
def test_a_bucket_that_is_not_there_is_told_as_one(place: Place) -> None:
    uri = place.put("a.ckpt", DATA)
    scheme, _, rest = uri.partition("://")
    gone = f"{scheme}://no-such-bucket-here/{rest.partition('/')[2]}"
    for act in (load, peek, download, verify, partial(load, cached=True)):
        with pytest.raises(
            CheckpointNotFoundError, match=r"no such bucket or container.*endpoint$"
        ):
            act(gone)
    with pytest.raises(CheckpointNotFoundError, match="no such bucket or container"):
        save({"w": torch.ones(1)}, gone)
    with pytest.raises(CheckpointNotFoundError, match="no such object"):
        load(place.missing())


def test_a_bucket_that_google_says_is_not_there() -> None:
    exceptions = needs.package("google.api_core.exceptions", "pip install google-cloud-storage")
    said = '404 GET https://…: {"message": "The specified bucket does not exist."}'
    found = explain(parse_uri("gs://none/a.ckpt"), exceptions.NotFound(said))
    assert isinstance(found, CheckpointNotFoundError)
    assert "no such bucket" in found.problem


@pytest.mark.parametrize("place", ["s3", "gcs", "azure"], indirect=True)
def test_errors_say_what_the_store_said_once(place: Place) -> None:
    for uri in (place.missing(), place.denied()):
        for act in (load, peek):
            with pytest.raises((CheckpointNotFoundError, PermissionError)) as caught:
                act(uri)
            assert "403 403" not in str(caught.value)
            assert "404 404" not in str(caught.value)
            assert "ErrorCode." not in str(caught.value)


@pytest.mark.parametrize("place", ["http", "s3", "gcs", "azure"], indirect=True)
@pytest.mark.parametrize("apart", [False, True])
def test_an_attempt_is_told_once(
    place: Place, apart: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last block fail side by side; hours apart they would be two problems."""
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    monkeypatch.setattr(_anemoi_ckpt.transport, "SAME_SECONDS", 0 if apart else 60)
    uri = place.put("a.ckpt", as_bytes({"w": torch.arange(100_000)}))
    assert place.server is not None
    asked: Counter[tuple[str, str | None]] = Counter()

    def twice(request: servers.Request) -> servers.Fault | None:
        asked[request.method, request.range] += 1
        return servers.Fault(status=503) if asked[request.method, request.range] < 3 else None

    place.server.fault = twice
    with caplog.at_level(logging.WARNING, "anemoi_ckpt"):
        load(uri)
    told = [record.getMessage().partition(" at ")[0] for record in caplog.records]
    requests = len(asked) if apart else 1 + parse_uri(uri).asked_first  # for its version, alone
    assert Counter(told) == {"attempt 1 of 6": requests, "attempt 2 of 6": requests}


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("where", ["open", "read"])
def test_a_network_file_system_that_loses_a_file_for_a_moment(
    code: int,
    where: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    path = tmp_path / "a.ckpt"
    checkpoint = {"w": torch.arange(300_000)}
    path.write_bytes(as_bytes(checkpoint))
    left = [9]

    def lost(*_: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))

    kept_open, kept_read = _anemoi_ckpt.places.local._open_at_once, Buffers.readfrom
    if where == "open":
        monkeypatch.setattr(
            _anemoi_ckpt.places.local, "_open_at_once", lambda *args: lost() or kept_open(*args)
        )
    else:
        monkeypatch.setattr(Buffers, "readfrom", lambda *args: lost() or kept_read(*args))
    with pytest.raises(UnreachableError, match="the file system did not answer") as caught:
        load(path, retries=1)
    assert os.strerror(code) in str(caught.value)
    left[0] = 2
    assert_same(load(path), checkpoint)
    assert left == [0]
    left[0] = 1
    assert download(path, tmp_path / "b.ckpt").read_bytes() == path.read_bytes()
