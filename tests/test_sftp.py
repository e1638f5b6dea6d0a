"""Files on hosts that SSH reaches: what `ssh` would do, and what sshd would bear."""

import errno
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import _anemoi_ckpt.places.parts
import _anemoi_ckpt.places.ssh
import _anemoi_ckpt.transport
import needs
import servers
from _anemoi_ckpt.places import Buffers, read_range, read_version, sibling
from _anemoi_ckpt.places.explained import explain
from _anemoi_ckpt.places.interrupts import Stop
from anemoi_ckpt import (
    SFTPURI,
    AccessDeniedError,
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    MissingPackageError,
    UnreachableError,
    download,
    find,
    latest,
    list_objects,
    list_page,
    load,
    load_into,
    open_stream,
    open_writer,
    parse_uri,
    peek,
    remove_object,
    save,
)
from checkpoints import as_bytes, assert_same
from pages import marked
from strategies import weights
from test_secrets import told, ways

paramiko = needs.package("paramiko", "pip install paramiko")
from sftp import PASSWORD, QUOTED, SFTPServer, sftp_server  # noqa: E402 - it imports paramiko

CHECKPOINT = {
    "state_dict": {"weight": torch.arange(100_000.0).view(100, 1000), "bias": torch.ones(100)},
    "optimizer_states": [torch.zeros(100_000)],
    "epoch": 3,
}
DATA = as_bytes(CHECKPOINT)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SFTPServer]:
    with sftp_server(tmp_path_factory.mktemp("sftp")) as server:
        yield server


@pytest.fixture
def host(running: SFTPServer) -> SFTPServer:
    """A known host, with a checkpoint in `run/last.ckpt`, and nothing else."""
    for path in sorted(running.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    (running.folder / "run").mkdir()
    (running.folder / "run/last.ckpt").write_bytes(DATA)
    running.fault, running.posix_rename, running.most_channels = None, True, 0
    running.log.clear()
    running.trusted()
    return running


def config(text: str) -> None:
    """Writes ~/.ssh/config."""
    path = Path.home() / ".ssh/config"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text(text)


def once(error: Exception | None, verb: str, server: SFTPServer | None = None) -> Any:
    """A fault of the first request of a kind: an error, or that the server hangs up."""
    faults = [error]

    def fault(asked: str, path: str) -> None:
        if asked == verb and faults:
            problem = faults.pop()
            if server is not None:
                server.drop()
            if problem is not None:
                raise problem

    return fault


# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("sftp://host/run/a.ckpt", ("host", "/run/a.ckpt")),
        ("ssh://host/a?b#c.ckpt", ("host", "/a?b#c.ckpt")),
        ("scp://me@host:2222/a%20b%3F.ckpt", ("host", "/a b?.ckpt", 2222, "me")),
        ("SFTP://me:a%2Fb%40c@[::1]:22/a", ("::1", "/a", 22, "me", "a/b@c")),
        ("sftp://me:@host//a", ("host", "//a", None, "me", "")),
    ],
)
def test_a_text_names_a_file_on_a_host(text: str, fields: Any) -> None:
    assert parse_uri(text) == SFTPURI(text, *fields)


@pytest.mark.parametrize(
    "text", ["sftp://", "sftp:///a", "sftp://host", "sftp://h:p/a", "sftp://me:a/b@host/c"]
)
def test_a_text_that_names_no_file_on_a_host(text: str) -> None:
    with pytest.raises(InvalidURIError, match="is no URL of a file on a host"):
        parse_uri(text)


def test_what_a_folder_on_a_host_is_called() -> None:
    for text in ("sftp://host/", "sftp://host/run/"):
        with pytest.raises(InvalidURIError, match="names a folder"):
            parse_uri(text)
    uri = parse_uri("sftp://me:hunter2@host/run/a%20b.ckpt")
    assert sibling(uri, "c d?.ckpt") == SFTPURI(
        "sftp://me:hunter2@host/run/c%20d%3F.ckpt", "host", "/run/c d?.ckpt", None, "me", "hunter2"
    )
    assert "hunter2" not in repr(uri)


# ── read ──────────────────────────────────────────────────────────────────────────────────────


def test_what_one_does_with_a_checkpoint(host: SFTPServer, tmp_path: Path) -> None:
    uri = f"{host.url}/run/last.ckpt"
    assert_same(load(uri), CHECKPOINT)
    assert_same(load(uri.replace("sftp:", "ssh:")), CHECKPOINT)
    assert_same(load(uri, cached=True), CHECKPOINT)
    params = {"password": PASSWORD}
    assert load(uri.replace(f":{QUOTED}", ""), cached=True, transport_params=params)["epoch"] == 3
    assert len(list(Path(os.environ["ANEMOI_CKPT_CACHE"]).glob("*/last.ckpt"))) == 1
    assert peek(uri).epoch == 3
    assert_same(load(download(uri, tmp_path / "a.ckpt")), CHECKPOINT)
    report = load_into(torch.nn.Linear(1000, 100), uri, lambda c: c["state_dict"])
    assert report.loaded == ("weight", "bias")
    assert report.bytes_moved < 400_400 * 1.02 + 2**20
    with open_stream(uri) as stream:
        assert stream.read() == DATA
        stream.raw.close()
        stream.raw.close()
    buffer = bytearray(5)
    version = read_range(parse_uri(uri), -5, Buffers(buffer))
    assert bytes(buffer) == DATA[-5:]
    assert version == read_version(parse_uri(uri))
    assert version.size == len(DATA)
    assert 1 < host.most_channels <= 8  # sshd allows ten
    assert sum(each.is_active() for each in host.transports) == 1


def test_two_loads_at_once_share_the_channels(host: SFTPServer) -> None:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(load(f"{host.url}/run/last.ckpt")))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same(result, CHECKPOINT)
    assert len(results) == 6
    assert host.most_channels <= 8


def test_a_connection_that_is_lost_is_made_again(host: SFTPServer, caplog) -> None:
    uri = f"{host.url}/run/last.ckpt"
    assert_same(load(uri), CHECKPOINT)
    host.drop()
    assert_same(load(uri), CHECKPOINT)
    host.fault = once(None, "read", host)
    assert_same(load(uri), CHECKPOINT)
    host.fault = once(None, "read", host)
    with open_stream(uri) as stream, pytest.raises(UnreachableError, match="no useful answer"):
        stream.read()
    host.fault = once(OSError(5, "disk"), "read")
    assert_same(load(uri), CHECKPOINT)
    assert not [each for each in caplog.records if each.name.startswith("anemoi_ckpt.ssh")]


def test_a_file_that_is_replaced_meanwhile(host: SFTPServer) -> None:
    uri, path = parse_uri(f"{host.url}/run/last.ckpt"), host.folder / "run/last.ckpt"
    version = read_version(uri)
    os.utime(path, (1_000, 1_000))
    with pytest.raises(ChangedError, match="replaced"):
        read_range(uri, 0, Buffers(bytearray(2)), version)


@pytest.mark.parametrize(
    "verb", [load, peek, open_stream, lambda uri: read_version(parse_uri(uri))]
)
def test_what_is_not_there_or_no_file(host: SFTPServer, verb: Any) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such file") as caught:
        verb(f"{host.url}/run/none.ckpt")
    assert PASSWORD not in str(caught.value)
    with pytest.raises(InvalidURIError, match="this is a folder"):
        verb(f"{host.url}/run")


def test_what_may_not_be_read(host: SFTPServer) -> None:
    host.fault = once(PermissionError(13, "no"), "open")
    with pytest.raises(AccessDeniedError, match="log in with `ssh` first"):
        open_stream(f"{host.url}/run/last.ckpt")


# ── login ─────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_password(host: SFTPServer, caplog) -> None:
    caplog.set_level(logging.DEBUG, "anemoi_ckpt")
    with pytest.raises(AccessDeniedError, match="refuses the login") as caught:
        load(f"sftp://me:{QUOTED}x@127.0.0.1:{host.port}/run/last.ckpt")
    text = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "hunter2" not in text
    with pytest.raises(AccessDeniedError, match="refuses the login"):
        load(f"sftp://me@127.0.0.1:{host.port}/run/last.ckpt")


def test_parameters_as_smart_open_has_them(host: SFTPServer, tmp_path: Path) -> None:
    uri = "sftp://nobody@nowhere/run/last.ckpt"
    where = {"host": "127.0.0.1", "port": host.port, "user": "me"}
    assert load(uri, transport_params={**where, "password": PASSWORD})["epoch"] == 3
    options = {"password": PASSWORD, "look_for_keys": False, "allow_agent": False}
    assert load(uri, transport_params={**where, "connect_kwargs": options})["epoch"] == 3
    with pytest.raises(TypeError, match=r"\['pasword'\] means nothing .* is it 'password'"):
        load(uri, transport_params={**where, "pasword": PASSWORD})


def test_keys_and_names_of_the_configuration(host: SFTPServer, tmp_path: Path) -> None:
    host.users_key = paramiko.ECDSAKey.generate()
    host.users_key.write_private_key_file(str(tmp_path / "key"))
    config(
        f"Host hpc\n HostName 127.0.0.1\n Port {host.port}\n User me\n Compression yes\n"
        f" IdentitiesOnly yes\n IdentityFile {tmp_path}/none\n IdentityFile {tmp_path}/key\n"
    )
    assert_same(load("sftp://hpc/run/last.ckpt"), CHECKPOINT)
    assert not any("password" in str(each) for each in host.log)
    host.users_key = None


def test_a_host_behind_another(host: SFTPServer, tmp_path: Path) -> None:
    """As OpenSSH does it: by a program that speaks for the host."""
    through = tmp_path / "through.py"
    through.write_text(
        "import os, socket, sys, threading\n"
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "def up():\n"
        "    while data := os.read(0, 65536): s.sendall(data)\n"
        "threading.Thread(target=up, daemon=True).start()\n"
        "while data := s.recv(65536): os.write(1, data)\n"
    )
    known = Path.home() / ".ssh/known_hosts"
    known.write_text(known.read_text().replace(f"[127.0.0.1]:{host.port}", "inner"))
    command = f"{sys.executable} {through} {host.port}"
    config(f"Host inner\n ProxyCommand {command}\n User me\n")
    assert load(f"sftp://me:{QUOTED}@inner/run/last.ckpt")["epoch"] == 3
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/args\nexec {command}\n')
    (tmp_path / "ssh").chmod(0o755)
    config("Host inner\n ProxyJump a@one,two:2222\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        host.drop()
        assert load(f"sftp://me:{QUOTED}@inner/run/last.ckpt")["epoch"] == 3
    args = (tmp_path / "args").read_text().split()
    assert args == ["-J", "a@one", "-W", "[inner]:22", "--", "two:2222"]
    host.drop()


def test_a_socket_of_the_callers_own(host: SFTPServer) -> None:
    class Own:  # that of a proxy, say
        def __init__(self) -> None:
            self._sock = socket.create_connection(("127.0.0.1", host.port))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

    uri = f"sftp://me@127.0.0.1:{host.port}/run/last.ckpt"
    params = {"password": PASSWORD, "connect_kwargs": {"sock": Own()}}
    assert load(uri, transport_params=params)["epoch"] == 3
    host.drop()


def test_a_read_that_is_stopped_connects_to_nobody(host: SFTPServer, monkeypatch) -> None:
    """Nor does it wait for who connects already."""
    stop = Stop()
    connect = _anemoi_ckpt.places.ssh.connect_socket
    connected: list[Any] = []

    def stopped(*address: Any) -> Any:
        connected.append(connect(*address))
        stop.set()
        return connected[0]

    monkeypatch.setattr(_anemoi_ckpt.places.ssh, "connect_socket", stopped)
    login = _anemoi_ckpt.places.ssh.Login("127.0.0.1", host.port, "me", PASSWORD)
    server = _anemoi_ckpt.places.ssh.Server(login, paramiko)
    with stop.heeded(), pytest.raises(ConnectionAbortedError):
        server.connect(5)
    assert connected[0].fileno() == -1
    with server._connecting, stop.heeded(), pytest.raises(ConnectionAbortedError):
        server.connect(5)


@pytest.mark.parametrize("wrong", ["nothing", "no file", "the password", "gone"])
def test_a_password_is_shown_nowhere(
    wrong: str, host: SFTPServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    uri = f"{host.url}/run/last.ckpt"
    if wrong == "no file":
        uri += "x"
    if wrong == "the password":
        uri = uri.replace(QUOTED, f"{QUOTED}x")
    if wrong == "gone":
        uri = uri.replace(str(host.port), str(servers.free_port()))
    host.fault = once(OSError(5, "disk"), "read")
    texts = [text for way in ways(uri, tmp_path, None) for text in told(way)]
    texts += [repr(parse_uri(uri)), caplog.text, *map(str, tmp_path.rglob("*"))]
    texts += [each.read_text("latin-1") for each in tmp_path.rglob("*") if each.is_file()]
    assert len(texts) > 30
    assert not [text for text in texts if "hunter2" in text]


# ── host keys ─────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_host_is_refused_at_once(host: SFTPServer, caplog) -> None:
    (Path.home() / ".ssh/known_hosts").unlink()
    with pytest.raises(UnreachableError, match=r"not among.*SHA256:.*connect once with `ssh 127"):
        load(f"{host.url}/run/last.ckpt")
    assert not caplog.records  # no second attempt
    assert not host.log
    for value in ("no", "accept-new"):
        config(f"Host 127.*\n StrictHostKeyChecking {value}\n")
        assert load(f"{host.url}/run/last.ckpt")["epoch"] == 3
        host.drop()
    other = Path.home() / "other"
    other.write_text(host.known_hosts)
    config(f"Host *\n UserKnownHostsFile ~/none {other}\n")
    assert load(f"{host.url}/run/last.ckpt")["epoch"] == 3


def test_a_host_whose_key_has_changed_is_refused(host: SFTPServer) -> None:
    known = Path.home() / ".ssh/known_hosts"
    other = paramiko.ECDSAKey.generate().get_base64()
    known.write_text(known.read_text().replace(host.key.get_base64(), other))
    config("Host *\n StrictHostKeyChecking no\n")
    host.drop()
    with pytest.raises(UnreachableError, match="another key than the one that is known"):
        load(f"{host.url}/run/last.ckpt")


# ── hosts that do not answer ──────────────────────────────────────────────────────────────────


def test_a_host_that_is_not_there(host: SFTPServer) -> None:
    with pytest.raises(UnreachableError):
        load(f"sftp://me:x@127.0.0.1:{servers.free_port()}/a.ckpt", retries=1)
    with pytest.raises(UnreachableError):
        load("sftp://me:x@host.invalid/a.ckpt", retries=0)


def test_a_server_that_speaks_no_ssh(http_server) -> None:
    with pytest.raises(UnreachableError, match="no useful answer"):
        load(f"sftp://me:x@127.0.0.1:{http_server.port}/a.ckpt", retries=0, timeout=3)


def test_a_host_that_falls_silent(host: SFTPServer) -> None:
    ended = threading.Event()
    host.fault = lambda verb, path: verb == "read" and ended.wait(20)
    began = time.monotonic()
    with pytest.raises(UnreachableError):
        load(f"{host.url}/run/last.ckpt", retries=0, timeout=0.9)
    assert time.monotonic() - began < 5
    ended.set()
    host.drop()


def test_a_login_that_takes_too_long_is_tried_again() -> None:
    uri = parse_uri("sftp://host/a")
    late = explain(uri, paramiko.AuthenticationException("Authentication timeout."))
    assert type(late) is UnreachableError
    assert not late.lasting
    assert type(explain(uri, paramiko.AuthenticationException("no"))) is AccessDeniedError


# ── list ──────────────────────────────────────────────────────────────────────────────────────


def test_what_is_in_a_folder(host: SFTPServer) -> None:
    (host.folder / "run/deep").mkdir()
    (host.folder / "run/deep/a b?.ckpt").write_bytes(DATA)
    (host.folder / "run/circle").symlink_to(host.folder / "run")
    (host.folder / "run/link.ckpt").symlink_to(host.folder / "run/last.ckpt")
    (host.folder / "run/gone.ckpt").symlink_to(host.folder / "nothing")
    os.utime(host.folder / "run/last.ckpt", (1_000_000_000, 1_000_000_000))

    def names(entries: Any) -> list[str]:
        return [str(each.uri).partition("/run/")[2] for each in entries]

    entries = list_objects(f"{host.url}/run")
    assert names(entries) == ["circle/", "deep/", "last.ckpt", "link.ckpt"]
    assert [each.is_folder for each in entries] == [True, True, False, False]
    assert entries[2].size == entries[3].size == len(DATA)
    assert f"{entries[2].modified:%Y-%m-%d}" == "2001-09-09"
    every = list_objects(f"{host.url}/run/", recursive=True)
    assert names(every) == ["deep/a%20b%3F.ckpt", "last.ckpt", "link.ckpt"]
    assert load(every[0])["epoch"] == 3
    assert names(find(f"{host.url}/run/**/a*.ckpt")) == ["deep/a%20b%3F.ckpt"]
    assert latest(f"{host.url}/run/deep").filename == "a b?.ckpt"
    assert names(list_objects(f"{host.url}/")) == [""]
    beginning = parse_uri(f"{host.url}/run/l")
    assert names(list_page(beginning).entries) == ["last.ckpt", "link.ckpt"]
    with pytest.raises(CheckpointNotFoundError):
        list_objects(f"{host.url}/none")

    def vanish(verb: str, path: str) -> None:
        if verb == "list_folder" and path == "/run/deep":
            raise FileNotFoundError(errno.ENOENT, "removed meanwhile")

    host.fault = vanish
    assert names(list_objects(f"{host.url}/run/", recursive=True)) == ["last.ckpt", "link.ckpt"]


# ── write ─────────────────────────────────────────────────────────────────────────────────────


def files(host: SFTPServer) -> list[str]:
    return sorted(str(p.relative_to(host.folder)) for p in host.folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("posix", [True, False])
def test_a_checkpoint_is_saved_and_replaced(host: SFTPServer, posix: bool) -> None:
    host.posix_rename = posix
    uri = f"{host.url}/run/{'é' * 120}.ckpt"
    save(CHECKPOINT, uri)
    assert_same(load(uri), CHECKPOINT)
    (path,) = (each for each in (host.folder / "run").iterdir() if each.name != "last.ckpt")
    path.chmod(0o640)
    save({"epoch": 4}, uri)
    assert load(uri) == {"epoch": 4}
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(files(host)) == 2
    remove_object(parse_uri(uri))
    remove_object(parse_uri(uri))
    assert files(host) == ["run/last.ckpt"]


def test_what_a_link_leads_to_is_replaced(host: SFTPServer) -> None:
    (host.folder / "other").mkdir()
    (host.folder / "other/link.ckpt").symlink_to(host.folder / "run/last.ckpt")
    save({"epoch": 4}, f"{host.url}/other/link.ckpt")
    assert (host.folder / "other/link.ckpt").is_symlink()
    assert load(f"{host.url}/run/last.ckpt") == {"epoch": 4}


BIG = {"w": torch.arange(40_000.0)}  # in three parts


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_anemoi_ckpt.places.parts, "PART_BYTES", 64 * 1024)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("verb", ["open", "write", "stat", "posix_rename", "chattr"])
def test_what_goes_wrong_once_is_tried_again(host: SFTPServer, verb: str) -> None:
    for server in (None, host):
        host.fault = once(OSError(5, "disk"), verb, server)
        save(BIG, f"{host.url}/run/last.ckpt")
        assert_same(load(f"{host.url}/run/last.ckpt"), BIG)
        assert files(host) == ["run/last.ckpt"]


def test_a_rename_whose_answer_was_lost(host: SFTPServer) -> None:
    def fault(verb: str, path: str) -> None:
        if verb == "posix_rename" and host.log.count((verb, path)) == 1:
            (part,) = (host.folder / "run").glob(".*.part")
            part.replace(host.folder / "run/last.ckpt")
            host.drop()

    host.fault = fault
    save({"epoch": 4}, f"{host.url}/run/last.ckpt")
    assert load(f"{host.url}/run/last.ckpt") == {"epoch": 4}


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("verb", ["write", "rename"])
def test_what_goes_wrong_for_good_leaves_nothing(host: SFTPServer, verb: str) -> None:
    def fault(asked: str, path: str) -> None:
        if asked.endswith(verb):  # with or without OpenSSH's
            raise OSError(28, "full")

    host.fault = fault
    with pytest.raises(UnreachableError):
        save(BIG, f"{host.url}/run/last.ckpt", retries=1)
    host.fault = None
    assert ("write", f"{host.folder}/run/last.ckpt") not in host.log
    assert files(host) == ["run/last.ckpt"]
    assert_same(load(f"{host.url}/run/last.ckpt"), CHECKPOINT)


def test_a_file_that_is_cut_on_the_host(host: SFTPServer) -> None:
    def fault(verb: str, path: str) -> None:
        if verb == "stat":
            for part in (host.folder / "run").glob(".*.part"):
                os.truncate(part, min(10, part.stat().st_size))

    host.fault = fault
    with pytest.raises(UnreachableError, match="10 bytes of"):
        save({"epoch": 4}, f"{host.url}/run/last.ckpt", retries=0)
    host.fault = None
    assert_same(load(f"{host.url}/run/last.ckpt"), CHECKPOINT)


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_rename_in_two_steps_that_fails_brings_the_old_file_back(
    host: SFTPServer, is_lost: bool
) -> None:
    host.posix_rename = False

    def fault(verb: str, path: str) -> None:
        if verb == "rename" and path.endswith(".part"):
            if is_lost:
                host.drop()
            raise OSError(28, "full")

    host.fault = fault
    with pytest.raises(CheckpointError):
        save({"epoch": 4}, f"{host.url}/run/last.ckpt", retries=0)
    with pytest.raises(CheckpointError):
        save({"epoch": 4}, f"{host.url}/run/new.ckpt", retries=0)
    host.fault = None
    assert files(host) == ["run/last.ckpt"]
    assert_same(load(f"{host.url}/run/last.ckpt"), CHECKPOINT)


@pytest.mark.usefixtures("_small_parts")
def test_parts_that_are_full(host: SFTPServer) -> None:
    for size in (0, 64 * 1024, 3 * 64 * 1024):
        with open_writer(f"{host.url}/run/a.bin") as stream:
            stream.write(b"x" * size)
        assert (host.folder / "run/a.bin").read_bytes() == b"x" * size


def test_where_nothing_can_be_saved(host: SFTPServer) -> None:
    host.fault = once(PermissionError(13, "no"), "posix_rename")
    with pytest.raises(AccessDeniedError):
        save({}, f"{host.url}/run/last.ckpt")
    with pytest.raises(InvalidURIError, match="this is a folder"):
        save({}, f"{host.url}/run")
    with pytest.raises(CheckpointNotFoundError):
        save({}, f"{host.url}/none/a.ckpt")
    assert files(host) == ["run/last.ckpt"]


def test_paramiko_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'anemoi-ckpt\[sftp\]'"):
        load("sftp://host/a.ckpt")


# ── README ────────────────────────────────────────────────────────────────────────────────────


def test_readme_hosts(host: SFTPServer) -> None:
    host.users_key = paramiko.ECDSAKey.generate()
    (host.folder / "scratch").mkdir()
    (host.folder / "run").rename(host.folder / "scratch/run")
    host.users_key.write_private_key_file(str(Path.home() / "key"))
    config(f"Host hpc-login\n HostName 127.0.0.1\n Port {host.port}\n IdentityFile ~/key\n")
    checkpoint = {"epoch": 4}
    exec(marked("ssh"), {"load": load, "save": save, "weights": weights, "checkpoint": checkpoint})
    assert load("sftp://me@hpc-login/scratch/run/small.ckpt") == checkpoint
    host.users_key = None
