"""Servers that others wrote: each answers a range from the end in its own way, and all are read."""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch

import needs
import servers
from anemoi_ckpt import download, latest, load, peek, save
from checkpoints import as_bytes, assert_same
from strategies import weights

CHECKPOINT = {
    "state_dict": {"w": torch.arange(300_000.0)},
    "optimizer_states": [torch.rand(900_000)],
    "epoch": 3,
}
DATA = as_bytes(CHECKPOINT)


def _node_server(script: str, options: list[str], said: str) -> Any:
    try:
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(servers.node_server(script, options, said))
            return stack.pop_all(), port
    except servers.UnavailableError as err:
        needs.give_up("node", err, str(err))


@contextlib.contextmanager
def _behind_a_proxy(kind: str, port: int) -> Iterator[servers.FaultProxy]:
    proxy = servers.FaultProxy(kind, "127.0.0.1", port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def answers_to_suffixes(proxy: servers.FaultProxy) -> list[int | None]:
    return [each.status for each in proxy.log if (each.range or "").startswith("bytes=-")]


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def http_server_of_npm(folder: Path) -> Iterator[int]:
    wanted = servers.free_port()
    options = [str(folder), "-a", "127.0.0.1", "-p", str(wanted), "-c-1"]
    stack, port = _node_server(
        "http-server/bin/http-server", options, r"Available on:\s+http://127.0.0.1:(\d+)"
    )
    with stack:
        yield port


@contextlib.contextmanager
def flask(folder: Path) -> Iterator[int]:
    package = needs.package("flask", "pip install -e '.[test]'")
    serving = needs.package("werkzeug.serving", "pip install -e '.[test]'")
    app = package.Flask("files")
    app.route("/<path:name>")(lambda name: package.send_from_directory(folder, name))
    server = serving.make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def uvicorn(folder: Path) -> Iterator[int]:
    try:  # MLflow brings both
        import starlette.staticfiles
        import uvicorn as package
    except ImportError as err:
        needs.give_up("mlflow", err, str(err))
    app = starlette.staticfiles.StaticFiles(directory=folder)
    port = servers.free_port()
    server = package.Server(package.Config(app, "127.0.0.1", port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield port
    finally:
        server.should_exit = True
        thread.join()


SERVERS: dict[str, tuple[Callable[[Path], Any], int]] = {  # and how a suffix range is answered
    "http-server": (http_server_of_npm, 416),
    "Flask": (flask, 206),
    "uvicorn": (uvicorn, 206),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_web_server(name: str, tmp_path: Path) -> None:
    start, answer = SERVERS[name]
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a b.ckpt").write_bytes(DATA)
    with start(folder) as port, _behind_a_proxy("http", port) as proxy:
        url = f"{proxy.url}/a%20b.ckpt"
        assert peek(url).epoch == 3
        assert proxy.bytes_sent < 300_000
        assert answers_to_suffixes(proxy) == [answer]
        assert_same(load(url, weights), CHECKPOINT["state_dict"])
        assert proxy.bytes_sent < 1_200_000 + 600_000
        assert_same(load(url), CHECKPOINT)
        assert download(url, tmp_path / "copy").read_bytes() == DATA


# ── S3 ────────────────────────────────────────────────────────────────────────────────────────


def test_s3rver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-d", str(tmp_path / "s3"), "-a", "127.0.0.1", "-p", "0", "-s"]
    (tmp_path / "s3").mkdir()
    stack, port = _node_server(
        "s3rver/bin/s3rver.js",
        [*options, "--configure-bucket", servers.BUCKET],
        r"listening on 127.0.0.1:(\d+)",
    )
    with stack, _behind_a_proxy("s3", port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "S3RVER")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3RVER")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        uri = f"s3://{servers.BUCKET}/run/last.ckpt"
        save(CHECKPOINT, uri)
        sdk, key = boto3.Session().client("s3"), {"Bucket": servers.BUCKET, "Key": "run/last.ckpt"}
        data = sdk.get_object(**key)["Body"].read()
        assert_same(torch.load(io.BytesIO(data), weights_only=True), CHECKPOINT)
        answered = sdk.get_object(**key, Range="bytes=-65536")["ContentRange"]
        assert answered == f"bytes 0-65536/{len(data)}"  # it takes -N for 0-N
        proxy.reset()
        assert peek(uri).epoch == 3
        assert answers_to_suffixes(proxy) == [206]
        asked = [each.range or "" for each in proxy.log]
        assert any(each.startswith(f"bytes={len(data) - 65536}-") for each in asked)  # anew
        assert proxy.bytes_sent < 300_000
        assert_same(load(uri, weights), CHECKPOINT["state_dict"])
        assert_same(load(uri), CHECKPOINT)
        assert_same(load(download(uri, tmp_path / "copy")), CHECKPOINT)
        assert str(latest(uri.removesuffix("last.ckpt"))) == uri
