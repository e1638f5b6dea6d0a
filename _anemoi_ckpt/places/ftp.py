"""Files on FTP servers (RFC 959, RFC 3659; with TLS, RFC 4217), through Python's ftplib."""

from __future__ import annotations

import ftplib
import functools
import io
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, BinaryIO, ClassVar

from attrs import field, frozen

from _anemoi_ckpt.errors import (
    AccessDeniedError,
    CheckpointError,
    UnreachableError,
)
from _anemoi_ckpt.places import (
    CHUNK_BYTES,
    URI,
    Buffers,
    Params,
    UnrangedError,
    Version,
    Writer,
    check_params,
    open_stream,
    open_writer,
    pinned,
    read_range,
    register_scheme,
    timeout_of,
)
from _anemoi_ckpt.places.explained import explain, explained, no_object
from _anemoi_ckpt.places.interrupts import register
from _anemoi_ckpt.places.parts import PartWriter, hidden_name
from _anemoi_ckpt.places.sftp import parse_host_url
from _anemoi_ckpt.places.uploading import committed

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class FTPURI(URI):
    """A file on an FTP server: ``ftp://[user[:password]@]host[:port]/path``, percent-encoded.

    ``ftps://`` asks for TLS once it is connected, as smart-open does.
    """

    host: str
    path: str
    port: int | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    connections: ClassVar[int] = 4  # at once: many servers allow few from one host
    path_field: ClassVar[str] = "path"
    is_quoted: ClassVar[bool] = True
    params: ClassVar[tuple[str, ...] | None] = ("source_address", "encoding")
    credentials: ClassVar[str] = "give user and password in the URL, percent-encoded"


# ── parse ─────────────────────────────────────────────────────────────────────────────────────


def parse_ftp(text: str) -> URI:
    """Parse ``ftp://[user[:password]@]host[:port]/path``.

    Raises:
        InvalidURIError: it names no host or no file.
    """
    return FTPURI(text, *parse_host_url(text))


for _scheme in ("ftp", "ftps"):
    register_scheme(_scheme, parse_ftp)


# ── client ────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _connected(uri: FTPURI, params: Params) -> Iterator[ftplib.FTP]:
    """Log in: a connection has one transfer at a time, and servers end those that do nothing."""
    check_params(uri, params, writing=True)
    options: dict[str, Any] = {"encoding": "utf-8", **(params or {}), "timeout": timeout_of(params)}
    is_secure = uri.text.lower().startswith("ftps:")
    with explained(uri), ExitStack() as stack:
        if is_secure:
            ftp: ftplib.FTP = ftplib.FTP_TLS(context=ssl.create_default_context(), **options)  # noqa: S321 - what the URL says
        else:
            ftp = ftplib.FTP(**options)  # noqa: S321 - likewise
        stack.enter_context(closing(ftp))
        ftp.connect(uri.host, uri.port or ftplib.FTP_PORT)
        register(ftp.sock)
        ftp.login(uri.user or "anonymous", uri.password or "")
        if isinstance(ftp, ftplib.FTP_TLS):
            ftp.prot_p()
        ftp.voidcmd("TYPE I")
        yield ftp


_LOGIN = {"530", "532"}  # replies (RFC 959 4.2)
_NO_FILE = {"450", "550", "553"}
_UNKNOWN = {"500", "501", "502", "504"}  # to commands that a server does not have


@explain.register
def explain_ftp_error(uri: FTPURI, err: Exception, pin: Version | None = None) -> CheckpointError:
    """Make a `CheckpointError` of a server's reply."""
    if not isinstance(err, ftplib.Error):
        return explain.dispatch(URI)(uri, err, pin)
    code, said = str(err)[:3], str(err).lower()
    if code in _LOGIN or (code in _NO_FILE and ("denied" in said or "permi" in said)):
        return AccessDeniedError(uri, f"access is denied ({err})", uri.credentials)
    if code in _NO_FILE:
        return no_object(uri, f"there is no such file ({err})")
    if isinstance(err, ftplib.error_perm):
        return CheckpointError(uri, f"the server refuses ({err})", "does it allow that?")
    return UnreachableError(uri, f"no useful answer ({err})", "try again later")


# ── open ──────────────────────────────────────────────────────────────────────────────────────


class _Download(io.RawIOBase):
    """A file on its way. At its end the server says whether that was all."""

    def __init__(self, uri: FTPURI, ftp: ftplib.FTP, data: Any, stack: ExitStack) -> None:
        self._uri, self._ftp, self._data, self._stack = uri, ftp, data, stack
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with explained(self._uri):
            count = 0 if self._ended else int(self._data.recv_into(buffer))
            if not count and not self._ended:
                self._ended = True
                self._data.close()
                self._ftp.voidresp()
        return count

    def close(self) -> None:
        super().close()
        self._stack.close()


@open_stream.register
def open_ftp(uri: FTPURI, transport_params: Params = None) -> BinaryIO:
    """Open a file for reading, with RETR."""
    with ExitStack() as stack:
        ftp = stack.enter_context(_connected(uri, transport_params))
        data = stack.enter_context(ftp.transfercmd(f"RETR {uri.path}"))
        register(data)
        return io.BufferedReader(_Download(uri, ftp, data, stack.pop_all()), CHUNK_BYTES)


# ── range ─────────────────────────────────────────────────────────────────────────────────────


@read_range.register
def read_ftp_range(
    uri: FTPURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Read from an offset on, with REST and RETR (RFC 3659 5), and hang up when it is enough."""
    with _connected(uri, transport_params) as ftp:
        version = pinned(uri, _version(ftp, uri.path), pin)
        start = max(0, version.size + offset) if offset < 0 else offset
        if start < version.size:
            data = ftp.transfercmd(f"RETR {uri.path}", rest=start or None)
            with data, data.makefile("rb", buffering=0) as file:
                register(data)
                buffers.readfrom(file)
    return version


def _version(ftp: ftplib.FTP, path: str) -> Version:
    """Ask for size and time (RFC 3659 3 and 4).

    Raises:
        UnrangedError: the server does not tell the size.
    """
    tag = None
    try:
        size = ftp.size(path)
    except ftplib.error_perm as err:
        if str(err)[:3] not in _UNKNOWN:
            raise
        raise UnrangedError from err
    with suppress(ftplib.error_perm):
        tag = ftp.sendcmd(f"MDTM {path}")
    return Version(size or 0, tag)


# ── write ─────────────────────────────────────────────────────────────────────────────────────


class _Part:
    """A hidden file beside the target: `parts.Parted`."""

    def __init__(self, uri: FTPURI, params: Params) -> None:
        self._uri, self._params, self._path = uri, params, hidden_name(uri.path)

    def begin(self) -> None:
        self.store(0, b"")

    def store(self, offset: int, part: bytes) -> None:
        with _connected(self._uri, self._params) as ftp:
            ftp.storbinary(f"STOR {self._path}", io.BytesIO(part), rest=offset or None)

    def finish(self, size: int, *, again: bool) -> None:
        with _connected(self._uri, self._params) as ftp:
            path = self._path
            try:
                found = ftp.size(path)
            except ftplib.error_perm:
                if not again:
                    raise
                path = self._uri.path
                found = ftp.size(path)
            if found != size:
                raise EOFError(f"{found} bytes of {size} are there")
            if path == self._path:
                ftp.rename(path, self._uri.path)

    def remove(self) -> None:
        with _connected(self._uri, self._params) as ftp, suppress(ftplib.error_perm):
            ftp.delete(self._path)


@open_writer.register
def open_ftp_writer(uri: FTPURI, transport_params: Params = None) -> Writer:
    """Write to a hidden file beside the target, which takes its place when all is written."""
    check_params(uri, transport_params, writing=True)
    return committed(uri, None, functools.partial(PartWriter, _Part(uri, transport_params)))
