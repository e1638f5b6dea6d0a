"""An SFTP server for one folder, by paramiko: what README's place of one's own is tried on."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko

PASSWORD = "secret"


class _Login(paramiko.ServerInterface):
    def check_auth_password(self, username: str, password: str) -> int:
        known = (username, password) == ("me", PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if known else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


class _Files(paramiko.SFTPServerInterface):
    folder: Path

    def stat(self, path: str) -> Any:
        try:
            return paramiko.SFTPAttributes.from_stat(Path(f"{self.folder}/{path}").stat())
        except OSError as err:
            return paramiko.SFTPServer.convert_errno(err.errno or 0)

    def open(self, path: str, flags: int, attr: Any) -> Any:
        try:
            file = Path(f"{self.folder}/{path}").open("rb")  # noqa: SIM115 - SFTPHandle closes it
        except OSError as err:
            return paramiko.SFTPServer.convert_errno(err.errno or 0)
        handle = paramiko.SFTPHandle(flags)
        handle.readfile = file  # type: ignore[attr-defined] # what paramiko looks for
        handle.stat = lambda: paramiko.SFTPAttributes.from_stat(os.fstat(file.fileno()))  # type: ignore[method-assign] # paramiko's handle asks for it by this name
        return handle


@contextlib.contextmanager
def sftp_server(folder: Path) -> Iterator[str]:
    """Serves the folder; gives what its URIs begin with."""
    listener = socket.create_server(("127.0.0.1", 0))
    key = paramiko.RSAKey.generate(2048)
    transports: list[paramiko.Transport] = []
    files = type("Files", (_Files,), {"folder": folder})

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                transport = paramiko.Transport(listener.accept()[0])
                transport.add_server_key(key)
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, files)
                transport.start_server(server=_Login())
                transports.append(transport)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"sftp://me:{PASSWORD}@127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
        for transport in transports:
            transport.close()
