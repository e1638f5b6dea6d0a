"""An SFTP server for one folder, by paramiko, which allows as many channels as sshd does."""

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import paramiko

PASSWORD = "hunter2+Zm/9q=="  # with what is written otherwise in a URL
QUOTED = "hunter2%2BZm%2F9q%3D%3D"
MAX_SESSIONS = 10  # of sshd


@attrs.define
class SFTPServer:
    """What runs: where, with what key, and what has gone on."""

    folder: Path
    key: Any = attrs.field(factory=paramiko.ECDSAKey.generate)
    users_key: Any = None
    """Lets `me` in, beside the password."""
    port: int = 0
    posix_rename: bool = True
    """Whether it has OpenSSH's request that replaces a file."""
    fault: Callable[[str, str], None] | None = None
    """Told verb and path before they are served; may raise an OSError, or hang up with `drop`."""
    log: list[tuple[str, str]] = attrs.field(factory=list)
    transports: list[Any] = attrs.field(factory=list)
    most_channels: int = 0
    """Most of one connection at once."""

    @property
    def url(self) -> str:
        return f"sftp://me:{QUOTED}@127.0.0.1:{self.port}"

    @property
    def known_hosts(self) -> str:
        """Its line in ~/.ssh/known_hosts."""
        return f"[127.0.0.1]:{self.port} {self.key.get_name()} {self.key.get_base64()}\n"

    def trusted(self) -> None:
        """Puts it into the known hosts of the home that is set now."""
        path = Path.home() / ".ssh/known_hosts"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(self.known_hosts)

    def drop(self) -> None:
        """Hangs up on all."""
        for transport in self.transports:
            transport.close()

    def served(self, verb: str, path: str) -> None:
        self.log.append((verb, path))
        if self.fault is not None:
            self.fault(verb, path)


class _Login(paramiko.ServerInterface):
    def __init__(self, server: SFTPServer) -> None:
        self.server = server
        self.sessions = 0

    def get_allowed_auths(self, username: str) -> str:
        return "password,publickey"

    def check_auth_password(self, username: str, password: str) -> int:
        known = (username, password) == ("me", PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if known else paramiko.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: Any) -> int:
        known = username == "me" and key == self.server.users_key
        return paramiko.AUTH_SUCCESSFUL if known else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        if self.sessions >= MAX_SESSIONS:
            return paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        self.sessions += 1
        self.server.most_channels = max(self.server.most_channels, self.sessions)
        return paramiko.OPEN_SUCCEEDED


def _answered(method: Any) -> Any:
    """What a method raises as an OSError is its answer."""

    def answer(self: Any, path: str, *args: Any) -> Any:
        try:
            self.running.served(method.__name__, path)
            return method(self, self.at(path), *args)
        except OSError as err:
            return paramiko.SFTPServer.convert_errno(err.errno or 0) or paramiko.SFTP_FAILURE

    return answer


class _Files(paramiko.SFTPServerInterface):
    running: SFTPServer

    def __init__(self, login: _Login, *args: Any, **kwargs: Any) -> None:
        super().__init__(login, *args, **kwargs)
        self.login = login

    def session_ended(self) -> None:
        self.login.sessions -= 1

    def at(self, path: str) -> Path:
        return Path(f"{self.running.folder}/{path}")

    @_answered
    def stat(self, path: Path) -> Any:
        return paramiko.SFTPAttributes.from_stat(path.stat())

    @_answered
    def lstat(self, path: Path) -> Any:
        return paramiko.SFTPAttributes.from_stat(path.lstat())

    @_answered
    def list_folder(self, path: Path) -> Any:
        return [
            paramiko.SFTPAttributes.from_stat(each.lstat(), each.name) for each in path.iterdir()
        ]

    def canonicalize(self, path: str) -> str:
        real = os.path.realpath(self.at(path))
        return "/" + os.path.relpath(real, os.path.realpath(self.running.folder)).removeprefix(".")

    @_answered
    def chattr(self, path: Path, attr: Any) -> int:
        path.chmod(attr.st_mode)
        return paramiko.SFTP_OK

    @_answered
    def remove(self, path: Path) -> int:
        path.unlink()
        return paramiko.SFTP_OK

    @_answered
    def rename(self, path: Path, to: str) -> int:
        if self.at(to).exists():  # as version 3 of the protocol has it
            return paramiko.SFTP_FAILURE
        path.rename(self.at(to))
        return paramiko.SFTP_OK

    @_answered
    def posix_rename(self, path: Path, to: str) -> int:
        if not self.running.posix_rename:
            return paramiko.SFTP_OP_UNSUPPORTED
        path.replace(self.at(to))
        return paramiko.SFTP_OK

    @_answered
    def open(self, path: Path, flags: int, attr: Any) -> Any:
        file = os.fdopen(os.open(path, flags, 0o644), "r+b" if flags & os.O_ACCMODE else "rb", 0)
        handle = _Handle(flags)
        handle.running, handle.path = self.running, str(path)
        handle.readfile = handle.writefile = file
        return handle


class _Handle(paramiko.SFTPHandle):
    running: SFTPServer
    path: str
    readfile: Any
    writefile: Any

    def stat(self) -> Any:
        return paramiko.SFTPAttributes.from_stat(os.fstat(self.readfile.fileno()))

    def read(self, offset: int, length: int) -> Any:
        try:
            self.running.served("read", self.path)
            self.readfile.seek(offset)
            return self.readfile.read(min(length, 64 * 1024)) or paramiko.SFTP_EOF
        except OSError as err:
            return paramiko.SFTPServer.convert_errno(err.errno or errno.EIO)

    def write(self, offset: int, data: bytes) -> int:
        try:
            self.running.served("write", self.path)
            self.writefile.seek(offset)
            self.writefile.write(data)
        except OSError as err:
            return paramiko.SFTPServer.convert_errno(err.errno or errno.EIO)
        return paramiko.SFTP_OK


@contextlib.contextmanager
def sftp_server(folder: Path, **options: Any) -> Iterator[SFTPServer]:
    """Serves the folder."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = SFTPServer(folder, port=listener.getsockname()[1], **options)
    files = type("Files", (_Files,), {"running": running})

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted = listener.accept()[0]
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                transport = paramiko.Transport(accepted)
                transport.add_server_key(running.key)
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, files)
                transport.set_log_channel("anemoi_ckpt.ssh.server")  # silent, as the client's
                running.transports.append(transport)
                transport.start_server(threading.Event(), _Login(running))  # waits for nobody

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield running
    finally:
        listener.close()
        running.drop()
