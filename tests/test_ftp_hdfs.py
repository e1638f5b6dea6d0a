"""Files on FTP servers, and in Hadoop's file system by its program and by HTTP."""

import contextlib
import json
import logging
import os
import socket
import ssl
import threading
import traceback
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import smart_open.hdfs
import torch

import _anemoi_ckpt.places.parts
import _anemoi_ckpt.transport
import needs
import servers
from _anemoi_ckpt.places import Buffers, path_of, read_range, read_version
from anemoi_ckpt import (
    FTPURI,
    HDFSURI,
    AccessDeniedError,
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    MissingPackageError,
    UnreachableError,
    WebHDFSURI,
    download,
    find,
    latest,
    list_objects,
    load,
    open_stream,
    open_writer,
    parse_uri,
    peek,
    remove_object,
    save,
)
from checkpoints import as_bytes, assert_same
from test_lasting import certificate
from test_secrets import told, ways

CHECKPOINT = {"w": torch.arange(60_000.0), "optimizer_states": torch.ones(60_000), "epoch": 3}
DATA = as_bytes(CHECKPOINT)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    monkeypatch.setattr(_anemoi_ckpt.places.parts, "PART_BYTES", 64 * 1024)


def read_by_all(uri: str, tmp_path: Path) -> None:
    assert_same(load(uri), CHECKPOINT)
    assert_same(load(uri, lambda checkpoint: checkpoint["w"]), CHECKPOINT["w"])
    assert_same(load(uri, cached=True), CHECKPOINT)
    assert_same(load(download(uri, tmp_path / "copy.ckpt")), CHECKPOINT)
    assert peek(uri).epoch == 3
    with open_stream(uri) as stream:
        assert stream.read() == DATA


def fill(folder: Path) -> Path:
    """Put checkpoints into a folder."""
    (folder / "deep/er").mkdir(parents=True, exist_ok=True)
    for name in ("a b.ckpt", "é.ckpt", "deep/c.ckpt", "deep/er/d%20.ckpt"):
        (folder / name).write_bytes(DATA)
    return folder


def check_listing(folder: str) -> None:
    """Assert that those of `fill` are listed, and that their entries can be loaded."""
    entries = list_objects(folder)
    assert [path_of(each.uri).rpartition("/run/")[2] for each in entries] == [
        *("a b.ckpt", "deep/", "é.ckpt")
    ]
    every = list_objects(folder, recursive=True)
    assert [path_of(each.uri).rpartition("/run/")[2] for each in every] == [
        *("a b.ckpt", "deep/c.ckpt", "deep/er/d%20.ckpt", "é.ckpt")
    ]
    assert {each.size for each in every} == {len(DATA)}
    for each in every:
        assert parse_uri(str(each.uri)) == each.uri
        with open_stream(each.uri) as stream:
            assert stream.read() == DATA
    assert [each.uri for each in find(folder)] == [each.uri for each in every]
    deep = find(f"{folder}/d*/**/*.ckpt")
    assert [each.uri.filename for each in deep] == ["c.ckpt", "d%20.ckpt"]
    assert latest(folder, key=lambda entry: path_of(entry.uri)).filename == "é.ckpt"


# ── FTP ───────────────────────────────────────────────────────────────────────────────────────


class FTPServer:
    """pyftpdlib's, for one folder."""

    def __init__(self, folder: Path) -> None:
        servers_of, handlers, authorizers, filesystems = (
            needs.package(f"pyftpdlib.{name}", "pip install pyftpdlib")
            for name in ("servers", "handlers", "authorizers", "filesystems")
        )
        self.folder = folder
        self.replies: dict[str, str] = {}
        """What commands are answered with, instead of being carried out."""
        self.cut: int | None = None
        """After so many bytes a download breaks off."""
        self.listing: bytes | None = None
        """What MLSD tells of a folder, instead of what is in it."""
        self.resumes = True
        """False: nothing is written from an offset on, nor over a file, as ProFTPD has it."""
        running = self

        class Data(handlers.DTPHandler):
            def send(self, data: bytes) -> int:
                if running.cut is not None:
                    count, running.cut = super().send(data[: running.cut]), None
                    self.cmd_channel.respond("426 broken off")
                    self.close()
                    return count
                return super().send(data)

        class Files(filesystems.AbstractedFS):
            def format_mlsx(self, *args: Any, **options: Any) -> Iterator[bytes]:
                told = super().format_mlsx(*args, **options)
                return told if running.listing is None else iter([running.listing])

        class Handler(handlers.FTPHandler):
            dtp_handler = Data
            abstracted_fs = Files
            use_sendfile = False

            def ftp_STOR(self, file: str, mode: str = "w") -> Any:  # noqa: N802 - of pyftpdlib
                if not running.resumes and self._restart_position:
                    self._restart_position = 0
                    return self.respond("451 Append/Restart not permitted, try again")
                if not running.resumes and Path(file).exists():
                    return self.respond("550 Overwrite permission denied")
                return super().ftp_STOR(file, mode)

            def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
                reply = running.replies.get(f"{cmd} {arg}", running.replies.get(cmd))
                if reply is None:
                    super().pre_process_command(line, cmd, arg)
                else:
                    if reply.endswith("!"):
                        del running.replies[cmd]
                    self.respond(reply)

        authorizer = authorizers.DummyAuthorizer()
        authorizer.add_user("me", "hunter2/x", str(folder), perm="elradfmwMT")
        authorizer.add_anonymous(str(folder))
        Handler.authorizer = authorizer
        self.server = servers_of.FTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.socket.getsockname()[1]
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while not self.ended.is_set():
            self.server.serve_forever(timeout=0.02, blocking=False, handle_exit=False)

    @property
    def url(self) -> str:
        return f"ftp://me:hunter2%2Fx@127.0.0.1:{self.port}"

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        self.server.close_all()


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[FTPServer]:
    (tmp_path / "served/run").mkdir(parents=True)
    (tmp_path / "served/run/a b.ckpt").write_bytes(DATA)
    server = FTPServer(tmp_path / "served")
    yield server
    server.close()


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_what_a_file_on_an_ftp_server_is_called() -> None:
    text = "ftps://me:a%40b@host:2121/run/a%20b.ckpt"
    assert parse_uri(text) == FTPURI(text, "host", "/run/a b.ckpt", 2121, "me", "a@b")
    with pytest.raises(InvalidURIError):
        parse_uri("ftp://host")


def test_files_are_read_from_an_ftp_server(ftp: FTPServer, tmp_path: Path) -> None:
    read_by_all(f"{ftp.url}/run/a%20b.ckpt", tmp_path)
    assert_same(load(f"ftp://127.0.0.1:{ftp.port}/run/a%20b.ckpt"), CHECKPOINT)  # as anybody
    ftp.cut = 100_000
    with open_stream(f"{ftp.url}/run/a%20b.ckpt") as stream, pytest.raises(UnreachableError):
        stream.read()
    ftp.cut = 10_000
    assert_same(load(f"{ftp.url}/run/a%20b.ckpt"), CHECKPOINT)
    ftp.replies["SIZE"] = "502 unknown"
    ftp.cut = 100_000
    assert_same(load(f"{ftp.url}/run/a%20b.ckpt"), CHECKPOINT)


def test_a_file_on_an_ftp_server_that_is_replaced(ftp: FTPServer) -> None:
    uri = parse_uri(f"{ftp.url}/run/a%20b.ckpt")
    version = read_version(uri)
    assert read_range(uri, len(DATA) + 5, Buffers(bytearray(1))) == version
    os.utime(ftp.folder / "run/a b.ckpt", (1_000, 1_000))
    with pytest.raises(ChangedError):
        read_range(uri, 0, Buffers(bytearray(1)), version)
    ftp.replies["MDTM"] = "502 unknown"
    assert read_version(uri).tag is None


@pytest.mark.parametrize(
    ("replies", "error", "said"),
    [
        ({}, CheckpointNotFoundError, "there is no such file"),
        ({"SIZE": "550 Permission denied."}, AccessDeniedError, "access is denied"),
        ({"USER": "530 no"}, AccessDeniedError, "give user and password"),
        ({"USER": "530 the maximum of clients is there"}, UnreachableError, "try again later"),
        ({"TYPE": "500 no"}, CheckpointError, "the server refuses"),
        ({"SIZE": "553 no"}, CheckpointError, "the server refuses .553 no.; is the folder there"),
        ({"SIZE": "450 No such file"}, CheckpointNotFoundError, "there is no such file"),
        ({"SIZE": "421 too many"}, UnreachableError, "no useful answer .421 too many"),
    ],
)
def test_what_an_ftp_server_refuses(ftp: FTPServer, replies: Any, error: Any, said: str) -> None:
    ftp.replies = replies
    with pytest.raises(error, match=said) as caught:
        load(f"{ftp.url}/none.ckpt", retries=0)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert type(caught.value) is error


@pytest.mark.parametrize("replies", [{}, {"PASS": "530 no"}, {"RETR": "426 hunter"}])
def test_a_password_of_an_ftp_server_is_shown_nowhere(
    ftp: FTPServer, replies: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "anemoi_ckpt")
    ftp.replies = replies
    uri = f"{ftp.url}/run/a%20b.ckpt"
    texts = [text for way in ways(uri, tmp_path, None) for text in told(way)]
    texts += [repr(parse_uri(uri)), caplog.text]
    assert len(texts) > 30
    assert not [text for text in texts if "hunter2" in text]


def test_an_ftp_server_that_is_not_there_or_knows_no_tls(ftp: FTPServer) -> None:
    with pytest.raises(UnreachableError):
        load(f"ftp://127.0.0.1:{servers.free_port()}/a.ckpt", retries=0)
    with pytest.raises(CheckpointError, match="refuses"):
        load(f"{ftp.url.replace('ftp:', 'ftps:')}/a.ckpt", retries=0)
    with pytest.raises(TypeError, match=r"'encodin'\] means nothing .* is it 'encoding'"):
        load(f"{ftp.url}/a.ckpt", transport_params={"encodin": "latin-1"})


class TLSServer:
    """An FTP server that wants TLS, and each transfer in the session of the commands (RFC 4217)."""

    def __init__(self, certificate: Path, data: bytes) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        self.data, self.said = data, list[str]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted = self.listener.accept()[0]
                threading.Thread(target=self._answer, args=(accepted,), daemon=True).start()

    def _answer(self, control: socket.socket) -> None:
        """Answer commands. What is written is all of the file, and no part of it."""
        passive, start = socket.create_server(("127.0.0.1", 0)), 0
        port = passive.getsockname()[1]
        replies = {"AUTH": "234 go on", "USER": "331 and?", "PASS": "230 in", "REST": "350 and?"}
        replies |= {"CWD": "550 no folder", "MDTM": "213 2024", "RETR": "150 it comes"}
        replies |= {"RNFR": "350 and?", "RNTO": "250 yes", "DELE": "250 gone"}
        replies["PASV"] = f"227 at (127,0,0,1,{port // 256},{port % 256})"
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(passive.close)
            stack.callback(control.close)
            control.sendall(b"220 hello\r\n")
            while line := self._line(control):
                verb, _, told = line.partition(" ")
                self.said.append(verb)
                replies["SIZE"] = f"213 {len(self.data)}"
                replies["STOR"] = "451 no restart" if start else "150 go on"
                control.sendall(f"{replies.get(verb, '200 yes')}\r\n".encode())
                if verb == "AUTH":
                    control = self.context.wrap_socket(control, server_side=True)
                    stack.callback(control.close)
                transfer = {"RETR": self._send, "STOR": self._receive}.get(verb)
                if transfer and replies[verb].startswith("150"):
                    control.sendall(transfer(passive.accept()[0], start) + b"\r\n")
                elif transfer:
                    passive.accept()[0].close()
                start = int(told) if verb == "REST" else 0

    def _send(self, accepted: socket.socket, start: int) -> bytes:
        with self.context.wrap_socket(accepted, server_side=True) as data:
            if not data.session_reused:
                return b"522 another session"
            data.sendall(self.data[start:])
        return b"226 that was all"

    def _receive(self, accepted: socket.socket, start: int) -> bytes:
        with self.context.wrap_socket(accepted, server_side=True) as data:
            self.data = b"".join(iter(lambda: data.recv(65536), b""))
            data.unwrap().close()
        return b"226 it is there"

    @staticmethod
    def _line(control: socket.socket) -> str:
        line = b""
        while not line.endswith(b"\r\n"):
            byte = control.recv(1)
            if not byte:
                return ""
            line += byte
        return line.decode().strip()


def test_files_are_read_and_written_with_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The login, too; and a certificate that nobody knows is refused at once."""
    pem = certificate(tmp_path)
    server = TLSServer(pem, DATA)
    uri = f"ftps://me:hunter2@127.0.0.1:{server.port}/a.ckpt"
    with pytest.raises(UnreachableError, match="certificate is not trusted"):
        load(uri)
    assert set(server.said) == {"AUTH"}
    server.said.clear()
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    with open_stream(uri) as stream:
        assert stream.read() == DATA
    assert server.said[:6] == ["AUTH", "USER", "PASS", "PBSZ", "PROT", "TYPE"]
    assert_same(load(uri, lambda checkpoint: checkpoint["w"]), CHECKPOINT["w"])
    save({**CHECKPOINT, "epoch": 4}, uri)
    assert server.said[-2:] == ["RNFR", "RNTO"]
    assert load(uri)["epoch"] == 4
    server.listener.close()


def test_files_are_saved_on_an_ftp_server(ftp: FTPServer) -> None:
    uri, folder = f"{ftp.url}/run/a%20b.ckpt", ftp.folder / "run"
    changed = {**CHECKPOINT, "epoch": 4}
    save(changed, uri)
    assert_same(torch.load(folder / "a b.ckpt"), changed)
    for command in ("STOR", "SIZE", "RNFR", "RNTO"):
        ftp.replies = {command: "451 later!"}
        save(CHECKPOINT, uri)
        assert_same(torch.load(folder / "a b.ckpt"), CHECKPOINT)
    ftp.replies = {"RNTO": "451 later"}
    with pytest.raises(UnreachableError):
        save(changed, uri, retries=1)
    assert names(folder) == ["a b.ckpt"]
    with pytest.raises(CheckpointError):
        save(changed, f"{ftp.url}/none/a.ckpt", retries=1)
    assert_same(torch.load(folder / "a b.ckpt"), CHECKPOINT)


def test_a_folder_on_an_ftp_server_that_vanishes_meanwhile(ftp: FTPServer) -> None:
    fill(ftp.folder / "run")
    deep = "CWD /run/deep"
    ftp.replies = {deep: "550 No such directory."}
    every = list_objects(f"{ftp.url}/run", recursive=True)
    assert [each.uri.filename for each in every] == ["a b.ckpt", "é.ckpt"]
    ftp.replies = {deep: "550 Permission denied."}
    with pytest.raises(AccessDeniedError):
        list_objects(f"{ftp.url}/run", recursive=True)


NO_MLSD = {"MLSD": "502 unknown", "OPTS": "501 unknown", "MLST": "500 unknown"}


@pytest.mark.parametrize("replies", [{}, NO_MLSD, {**NO_MLSD, "MDTM": "502 unknown"}])
def test_a_folder_on_an_ftp_server_is_listed(ftp: FTPServer, replies: dict[str, str]) -> None:
    folder, base = fill(ftp.folder / "run"), f"{ftp.url}/run"
    ftp.replies = replies
    check_listing(base)
    (folder / "gone.ckpt").symlink_to(folder / "nothing")
    if "MLSD" not in replies:
        (folder / "circle").symlink_to(folder)
    assert len(list_objects(base, recursive=True)) == 4
    os.utime(folder / "a b.ckpt", (1_000, 1_000))
    known = {} if "MDTM" in replies else {datetime.fromtimestamp(1_000, UTC)}
    found = find(f"{base}/a*")
    assert [each.uri for each in found] == [parse_uri(f"{base}/a%20b.ckpt")]
    assert {each.modified for each in found} - {None} == set(known)
    with pytest.raises(CheckpointNotFoundError, match=r"one of these: a b.ckpt"):
        load(f"{base}/a%20c.ckpt")
    with pytest.raises(CheckpointNotFoundError, match="no such file or folder"):
        list_objects(f"{base}/none")


@pytest.mark.parametrize("reply", ["550 No files found", "450 none"])
def test_an_empty_folder_on_an_ftp_server(ftp: FTPServer, reply: str) -> None:
    ftp.replies = {"MLSD": "502 unknown", "NLST": reply}
    assert list_objects(f"{ftp.url}/run") == []
    ftp.replies = {"MLSD": "502 unknown", "NLST": "502 unknown"}
    with pytest.raises(CheckpointError, match="the server refuses"):
        list_objects(f"{ftp.url}/run")
    ftp.replies = {"MLSD": "553 no"}
    with pytest.raises(CheckpointError, match="the server refuses"):
        list_objects(f"{ftp.url}/run")


def test_what_an_ftp_server_lists_that_is_elsewhere(ftp: FTPServer) -> None:
    """Names of other folders are left out; what links lead to is looked up."""
    fill(ftp.folder / "run")
    ftp.listing = (
        b"type=cdir; run\r\ntype=file;size=3; ../x.ckpt\r\ntype=file;size=3; /etc/x.ckpt\r\n"
        b"type=pdir; ..\r\ntype=OS.unix=slink:/x; \xc3\xa9.ckpt\r\n"
        b"Type=File;Size=7;Modify=20240102030405.123; b.ckpt\r\n"
        b"type=OS.unix=symlink; deep\r\ntype=OS.unix=symlink; gone\r\n"
        b"type=file;modify=x; c.ckpt\r\n"
    )
    entries = list_objects(f"{ftp.url}/run")
    assert [(each.uri.filename, each.size) for each in entries if not each.is_folder] == [
        *(("b.ckpt", 7), ("c.ckpt", None), ("é.ckpt", len(DATA)))
    ]
    assert [str(each.uri) for each in entries if each.is_folder] == [f"{ftp.url}/run/deep/"]
    assert entries[0].modified == datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert entries[1].modified is None
    ftp.replies = {"SIZE": "502 unknown"}
    assert [each.size for each in list_objects(f"{ftp.url}/run")] == [7, *[None] * 4]


def test_files_are_removed_from_an_ftp_server(ftp: FTPServer) -> None:
    uri = f"{ftp.url}/run/a%20b.ckpt"
    ftp.replies = {"DELE": "550 Delete operation failed."}  # vsftpd says the same where none is
    with pytest.raises(AccessDeniedError):
        remove_object(uri)
    ftp.replies = {}
    remove_object(uri)
    assert names(ftp.folder / "run") == []
    remove_object(uri)
    with pytest.raises(InvalidURIError, match="this is a folder"):
        remove_object(f"{ftp.url}/run")
    assert (ftp.folder / "run").is_dir()


def test_a_folder_on_an_ftp_server_is_told_as_one(ftp: FTPServer) -> None:
    for verb in (load, open_stream, peek, lambda uri: save({}, uri)):
        with pytest.raises(InvalidURIError, match="this is a folder"):
            verb(f"{ftp.url}/run")
    assert names(ftp.folder) == ["run"]


def test_a_file_on_an_ftp_server_that_may_not_be_read_or_replaced(ftp: FTPServer) -> None:
    uri = f"{ftp.url}/run/a%20b.ckpt"
    ftp.replies = {"RETR": "550 Failed to open file.", "RNTO": "550 It exists already"}
    for verb in (load, open_stream, lambda uri: save({}, uri)):
        with pytest.raises(AccessDeniedError):
            verb(uri)
    assert names(ftp.folder / "run") == ["a b.ckpt"]


@pytest.mark.parametrize(
    "replies",
    [
        {"RETR": "450 busy!"},
        {"REST": "502 unknown"},
        {"REST": "451 Restart not permitted, try again"},
        {"SIZE": "200 what"},
    ],
)
def test_ftp_servers_that_are_busy_or_know_little(ftp: FTPServer, replies: Any) -> None:
    ftp.replies = replies
    assert_same(load(f"{ftp.url}/run/a%20b.ckpt"), CHECKPOINT)


def test_files_are_saved_where_no_upload_is_gone_on_with(ftp: FTPServer) -> None:
    ftp.resumes = False
    uri, folder = f"{ftp.url}/run/a%20b.ckpt", ftp.folder / "run"
    (folder / "a b.ckpt").unlink()
    save(CHECKPOINT, uri)
    assert (folder / "a b.ckpt").read_bytes() == DATA
    ftp.replies = {"RNTO": "451 later!"}
    save({"epoch": 4}, uri)
    assert load(uri) == {"epoch": 4}
    part = _anemoi_ckpt.places.ftp._Part(parse_uri(uri), None)
    part.begin()
    part.store(0, b"abc")
    part._transfer._data.close()
    with pytest.raises(OSError, match="descriptor"):
        part.store(3, b"de")
    with pytest.raises(CheckpointError, match="goes on with no upload; save it anew"):
        part.store(3, b"de")
    part.remove()
    part.begin()
    part.store(0, b"abc")
    part.remove()
    assert names(folder) == ["a b.ckpt"]
    ftp.replies = {"STOR": "452 full"}
    with pytest.raises(UnreachableError, match="452 full"):
        save(CHECKPOINT, uri, retries=1)
    assert names(folder) == ["a b.ckpt"]


def test_a_file_on_an_ftp_server_that_is_renamed_or_cut_meanwhile(ftp: FTPServer) -> None:
    uri, folder = parse_uri(f"{ftp.url}/run/a%20b.ckpt"), ftp.folder / "run"
    part = _anemoi_ckpt.places.ftp._Part(uri, None)
    part.begin()
    part.store(0, b"abc")
    with pytest.raises(UnreachableError, match="3 bytes of 4"):
        part.finish(4, again=False)
    part.finish(3, again=False)
    part.finish(3, again=True)  # the answer was lost
    assert (folder / "a b.ckpt").read_bytes() == b"abc"
    with pytest.raises(CheckpointNotFoundError):
        part.finish(3, again=False)


# ── HDFS, by its program ──────────────────────────────────────────────────────────────────────

PROGRAM = r"""#!/bin/sh
verb=$2
case $3 in -R) depth=9;; *) depth=1;; esac
for told; do :; done
told=$(printf %s "$told" | sed 's/\(^\|[^\\]\)[*?[{{]/\1<glob>/g; s/\\\(.\)/\1/g')
path={folder}${{told#*namenode:9000}}
broken() {{ case $path in *broken*) exit 1;; esac }}
case $verb in
    -cat) broken; exec cat "$path";;
    -test) [ -e "$path" ];;
    -ls) broken; [ -e "$path" ] && echo Found items && find "$path" -mindepth 1 -maxdepth $depth \
        -printf "%M   3 me domain users %s %TY-%Tm-%Td %TH:%TM ${{told%/}}/%P\n";;
    -rm) broken; [ ! -d "$path" ] && rm -f "$path";;
    -put) cat > "$path._COPYING_"; broken; mv "$path._COPYING_" "$path";;
esac
"""


@pytest.fixture
def hadoop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `hdfs`; gives the folder that it serves."""
    folder = tmp_path / "hadoop"
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin/hdfs"
    program.write_text(PROGRAM.format(folder=folder))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return folder


def test_what_a_file_in_hadoop_is_called() -> None:
    assert parse_uri("hdfs:///a").location == "/a"
    assert parse_uri("HDFS://host:9000/a b").location == "hdfs://host:9000/a b"
    assert parse_uri("viewfs://x/a").location == "viewfs://x/a"
    assert isinstance(parse_uri("hdfs:///a/b.ckpt"), HDFSURI)
    assert parse_uri("hdfs:///a/b.ckpt").filename == "b.ckpt"
    for text in ("hdfs://host", "hdfs:///", "hdfs://h/a/", "webhdfs:///a", "webhdfs://h/a/?x=1"):
        with pytest.raises(InvalidURIError, match="names no file"):
            parse_uri(text)


needs_terminate = pytest.mark.skipif(
    not hasattr(smart_open.hdfs.CliRawOutputBase, "terminate"),
    reason="smart-open>=9 is not installed",
)


@pytest.mark.parametrize("host", ["namenode:9000", ""])
def test_a_folder_in_hadoop_is_listed(hadoop: Path, host: str, capfd) -> None:
    folder = fill(hadoop / "run")
    base = f"hdfs://{host}/run"
    check_listing(base)
    assert find(f"{base}/*.ckpt")[0].uri == parse_uri(f"{base}/a b.ckpt")
    modified = find(f"{base}/a*")[0].modified
    assert timedelta(0) <= datetime.now(UTC) - modified < timedelta(minutes=2)
    with pytest.raises(CheckpointNotFoundError, match=r"one of these: a b.ckpt"):
        load(f"{base}/a c.ckpt", retries=0)
    remove_object(f"{base}/é.ckpt")
    remove_object(f"{base}/é.ckpt")
    assert names(folder) == ["a b.ckpt", "deep"]
    with pytest.raises(CheckpointError, match="hdfs failed"):
        remove_object(f"{base}/deep")
    with pytest.raises(CheckpointNotFoundError, match="there is no such file"):
        list_objects(f"{base}/none")


def test_a_name_in_hadoop_is_no_glob(hadoop: Path) -> None:
    (hadoop / "run[1]").mkdir()
    (hadoop / "run[1]/a{1,2}?*.ckpt").write_bytes(DATA)
    uri = "hdfs:///run[1]/a{1,2}?*.ckpt"
    assert [each.uri for each in list_objects("hdfs:///run[1]")] == [HDFSURI(uri)]
    with open_stream(HDFSURI(uri)) as stream:
        assert stream.read() == DATA


@needs_terminate
def test_files_are_read_and_written_by_hdfs(hadoop: Path, tmp_path: Path, capfd) -> None:
    uri = "hdfs://namenode:9000/a.ckpt"
    save(CHECKPOINT, uri)
    read_by_all(uri, tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="there is no such file"):
        load("hdfs://namenode:9000/none.ckpt", retries=0)
    (hadoop / "broken.ckpt").write_bytes(DATA)
    with pytest.raises(CheckpointError, match=r"hdfs failed .*exit status 1.*kinit"):
        load("hdfs://namenode:9000/broken.ckpt", retries=0)
    with pytest.raises(CheckpointError, match="exit status 1"):
        save({"epoch": 4}, "hdfs://namenode:9000/broken.ckpt")
    with pytest.raises(RuntimeError, match="mine"):
        write_half(uri)
    assert (hadoop / "a.ckpt").read_bytes() == DATA
    with open_writer(uri) as stream, pytest.raises(CheckpointError, match="bytes-like"):
        stream.write("text")  # type: ignore[arg-type] # the case
    with pytest.raises(TypeError, match="means nothing"):
        load(uri, transport_params={"client": 1})


def test_an_older_smart_open(hadoop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hadoop / "a.ckpt").write_bytes(DATA)
    monkeypatch.delattr(smart_open.hdfs.CliRawOutputBase, "terminate", raising=False)
    for verb in (load, lambda uri: save({}, uri)):
        with pytest.raises(MissingPackageError, match="before 9 leaves half a file"):
            verb("hdfs://namenode:9000/a.ckpt")
    assert (hadoop / "a.ckpt").read_bytes() == DATA


def write_half(uri: str) -> None:
    with open_writer(uri) as stream:
        stream.write(b"half")
        raise RuntimeError("mine")


def test_a_program_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for verb in (load, lambda uri: save({}, uri)):
        with pytest.raises(MissingPackageError, match="the program hdfs is not there"):
            verb("hdfs:///a.ckpt")


# ── HDFS, by HTTP ─────────────────────────────────────────────────────────────────────────────


class NameNode(servers.Server):
    """A name node, which is its own data node (Hadoop's manual, "WebHDFS REST API")."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.overwrites = self.redirects = self.ranges = True
        self.time = 1_000

    def answer(self, request: servers.Request, fault: servers.Fault) -> servers.Reply:
        query = dict(urllib.parse.parse_qsl(request.query))
        path = urllib.parse.unquote(request.path.removeprefix("/webhdfs/v1"))
        if query.get("user.name", "me") != "me":
            return servers.error_reply("http", 403)
        if query["op"] in ("OPEN", "CREATE", "APPEND") and "data" not in query and self.redirects:
            location = f"{self.url}{request.target}&data=1"
            return servers.Reply(307, servers._headers({"Location": location}))
        told: Any = getattr(self, query["op"].lower())(path, query, request.body)
        if told is None:
            told = {"RemoteException": {"exception": "FileNotFoundException", "message": path}}
            body = json.dumps(told).encode()
            return servers.Reply(404, servers._headers({}), body)
        body = told if isinstance(told, bytes) else json.dumps(told).encode()
        status = 201 if query["op"] == "CREATE" else 200
        return servers.Reply(status, servers._headers({}), body)

    def open(self, path: str, query: Any, body: bytes) -> Any:
        start, length = int(query.get("offset", 0)), int(query.get("length", 2**40))
        start, length = (start, length) if self.ranges else (0, 2**40)
        return self.files[path][start : start + length] if path in self.files else None

    def getfilestatus(self, path: str, query: Any, body: bytes) -> Any:
        kind = "FILE" if path in self.files else "DIRECTORY"
        if kind == "DIRECTORY" and not any(each.startswith(f"{path}/") for each in self.files):
            return None
        size = len(self.files.get(path, b""))
        return {"FileStatus": {"length": size, "modificationTime": self.time, "type": kind}}

    def liststatus(self, path: str, query: Any, body: bytes) -> Any:
        beneath = f"{path.rstrip('/')}/"
        within = {each.removeprefix(beneath) for each in self.files if each.startswith(beneath)}
        if not within:
            return None
        listed = []
        for name in {each.partition("/")[0] for each in within}:
            told = self.getfilestatus(beneath + name, query, body)["FileStatus"]
            listed.append({**told, "pathSuffix": name})
        return {"FileStatuses": {"FileStatus": listed}}

    def create(self, path: str, query: Any, body: bytes) -> Any:
        self.files[path] = body
        return b""

    def append(self, path: str, query: Any, body: bytes) -> Any:
        self.files[path] += body
        return b""

    def rename(self, path: str, query: Any, body: bytes) -> Any:
        if not self.overwrites:
            return {"boolean": False}
        self.files[query["destination"]] = self.files.pop(path)
        return b""

    def delete(self, path: str, query: Any, body: bytes) -> Any:
        return {"boolean": self.files.pop(path, None) is not None}


@pytest.fixture
def node() -> Iterator[NameNode]:
    running = NameNode()
    running.start()
    running.files["/run/a b.ckpt"] = DATA
    yield running
    running.close()


def at(node: NameNode) -> str:
    return f"webhdfs://me@127.0.0.1:{node.port}/run/a%20b.ckpt"


def test_files_are_read_through_a_name_node(node: NameNode, tmp_path: Path) -> None:
    read_by_all(at(node), tmp_path)
    node.reset()
    assert load(at(node), lambda checkpoint: checkpoint["epoch"]) == 3
    assert node.bytes_sent < 2 * 65_536 + 5_000
    assert all("user.name=me" in each.query for each in node.log)
    assert isinstance(parse_uri(at(node)), WebHDFSURI)
    assert parse_uri(at(node)).filename == "a b.ckpt"
    plain = at(node).replace("me@", "") + "?delegation=hunter2"
    assert load(plain)["epoch"] == 3
    assert "delegation=hunter2" in node.log[-1].query
    with pytest.raises(CheckpointNotFoundError) as caught:
        load(plain.replace("%20", ""))
    with pytest.raises(AccessDeniedError, match="give the user in the URL"):
        load(at(node).replace("me@", "you@"))
    with pytest.raises(InvalidURIError, match="this is a folder"):
        load(at(node).replace("/a%20b.ckpt", ""))
    assert str(caught.value).startswith("webhdfs://")
    version = read_version(parse_uri(plain))
    assert read_range(parse_uri(plain), len(DATA), Buffers(bytearray(1))) == version
    node.time = 2_000
    with pytest.raises(ChangedError):
        read_range(parse_uri(plain), 0, Buffers(bytearray(1)), version)


def test_files_are_saved_through_a_name_node(node: NameNode) -> None:
    small, changed = {"w": torch.ones(20_000)}, {**CHECKPOINT, "epoch": 4}
    save(changed, at(node), transport_params={"min_part_size": 1})
    assert list(node.files) == ["/run/a b.ckpt"]
    assert_same(load(at(node)), changed)
    for number in range(10):  # the answer to any request may be lost
        node.fault = lost(number)
        save(small, at(node))
        node.fault = None
        assert node.files == {"/run/a b.ckpt": as_bytes(small)}
        assert list(node.files) == ["/run/a b.ckpt"]
    node.overwrites = False
    with pytest.raises(CheckpointError, match="replaces no file that is there"):
        save(changed, at(node))
    assert node.files == {"/run/a b.ckpt": as_bytes(small)}


def test_a_folder_behind_a_name_node_is_listed(node: NameNode) -> None:
    for name in ("é.ckpt", "deep/c.ckpt", "deep/er/d%20.ckpt"):
        node.files[f"/run/{name}"] = DATA
    base = at(node).rpartition("/")[0]
    check_listing(base)
    token = "delegation=hunter2"
    found = find(f"{base}/a*.ckpt?{token}")
    assert [str(each.uri) for each in found] == [f"{at(node)}?{token}"]
    assert found[0].modified == datetime.fromtimestamp(1, UTC)
    assert "hunter2" not in f"{found!r}{found}"
    assert node.log[-1].query.endswith(token)
    listed = list_objects(f"WEBHDFS{base.removeprefix('webhdfs')}/?{token}")
    assert [path_of(each.uri) for each in listed] == ["/run/a b.ckpt", "/run/deep/", "/run/é.ckpt"]
    with pytest.raises(CheckpointNotFoundError, match=r"one of these: a b.ckpt") as caught:
        load(f"{base}/a%20c.ckpt?{token}")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(CheckpointNotFoundError):
        list_objects(f"{base}/none")


def test_a_folder_behind_a_name_node_that_vanishes_meanwhile(node: NameNode) -> None:
    node.files["/run/deep/c.ckpt"] = DATA
    node.fault = lambda request: servers.Fault(status=404) if "deep" in request.path else None
    every = list_objects(at(node).rpartition("/")[0], recursive=True)
    assert [each.uri.filename for each in every] == ["a b.ckpt"]


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("StandbyException", UnreachableError, "gives nothing now .READ is not for you.; name"),
        ("AccessControlException", AccessDeniedError, "403.*: READ is not for you; give the user"),
    ],
)
def test_what_a_name_node_says(node: NameNode, name: str, error: Any, said: str) -> None:
    told = {"exception": name, "message": "READ is not for you\nat org.apache.hadoop"}
    body = json.dumps({"RemoteException": told}).encode()
    node.fault = lambda request: servers.Fault(status=403, body=body)
    with pytest.raises(error, match=said) as caught:
        load(at(node), retries=0)
    assert "apache" not in str(caught.value)
    with pytest.raises(error, match=said):
        save({}, at(node), retries=0)
    node.fault = lambda request: servers.Fault(status=404, body=b"[]")
    with pytest.raises(CheckpointNotFoundError):
        load(at(node), retries=0)


def test_a_server_that_is_no_name_node(node: NameNode) -> None:
    node.redirects = False
    with pytest.raises(CheckpointError, match="names no data node"):
        save({}, at(node), retries=0)
    node.ranges = False
    assert_same(load(at(node)), CHECKPOINT)


def test_files_are_removed_through_a_name_node(node: NameNode) -> None:
    node.files["/run/deep/c.ckpt"] = DATA
    remove_object(at(node))
    remove_object(at(node))
    assert list(node.files) == ["/run/deep/c.ckpt"]
    with pytest.raises(InvalidURIError, match="this is a folder"):
        remove_object(at(node).replace("a%20b.ckpt", "deep"))
    assert list(node.files) == ["/run/deep/c.ckpt"]


def lost(number: int) -> Any:
    """A fault of one request, which is carried out, and whose answer is cut."""
    left = [number]

    def fault(request: servers.Request) -> servers.Fault | None:
        left[0] -= 1
        return servers.Fault(reset=True) if left[0] == -1 else None

    return fault


def test_a_part_that_others_write_to(node: NameNode) -> None:
    part = _anemoi_ckpt.places.hdfs._Part(parse_uri(at(node)), None)
    part.begin()
    part.store(0, b"abc")
    part.store(0, b"abc")  # the answer was lost
    with pytest.raises(EOFError, match="3 bytes of 5"):
        part.store(5, b"de")
    with pytest.raises(EOFError, match="3 bytes of 4"):
        part.finish(4, again=False)
    part.finish(3, again=False)
    part.finish(3, again=True)
    with pytest.raises(CheckpointNotFoundError):
        part.finish(3, again=False)
    assert node.files == {"/run/a b.ckpt": b"abc"}


def test_a_password_for_webhdfs_is_refused_and_shown_nowhere() -> None:
    with pytest.raises(
        InvalidURIError, match="WebHDFS takes no password; write webhdfs://user@"
    ) as e:
        parse_uri("webhdfs://me:hunter2@host:9870/a.ckpt")
    assert "hunter2" not in f"{e.value!r} {e.value}"
    assert parse_uri("webhdfs://me@host:9870/a.ckpt").url.endswith("&user.name=me")
