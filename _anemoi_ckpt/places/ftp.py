"""Files on FTP servers (RFC 959, RFC 3659; with TLS, RFC 4217), through Python's ftplib."""

from __future__ import annotations

import errno
import ftplib
import functools
import io
import posixpath
import re
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from typing import Any, BinaryIO, ClassVar, cast

from attrs import field, frozen

from _anemoi_ckpt.errors import (
    AccessDeniedError,
    CheckpointError,
    InvalidURIError,
    UnreachableError,
)
from _anemoi_ckpt.places import (
    CHUNK_BYTES,
    URI,
    Buffers,
    Entry,
    Page,
    Params,
    UnrangedError,
    Version,
    Writer,
    check_params,
    list_page,
    open_stream,
    open_writer,
    pinned,
    read_range,
    read_version,
    register_scheme,
    remove_object,
    timeout_of,
)
from _anemoi_ckpt.places.explained import explain, explained, no_object, unless_missing
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


class _FTPS(ftplib.FTP_TLS):
    """Transfers in the TLS session of the commands, as many servers want it: vsftpd, FileZilla."""

    def ntransfercmd(self, cmd: str, rest: int | str | None = None) -> tuple[Any, int | None]:
        data, size = ftplib.FTP.ntransfercmd(self, cmd, rest)  # noqa: S321 - TLS follows
        session = cast("ssl.SSLSocket", self.sock).session
        return self.context.wrap_socket(data, server_hostname=self.host, session=session), size


@contextmanager
def _connected(uri: FTPURI, params: Params) -> Iterator[ftplib.FTP]:
    """Log in: a connection has one transfer at a time, and servers end those that do nothing."""
    check_params(uri, params, writing=True)
    options: dict[str, Any] = {"encoding": "utf-8", **(params or {}), "timeout": timeout_of(params)}
    is_secure = uri.text.lower().startswith("ftps:")
    with explained(uri), ExitStack() as stack:
        if is_secure:
            ftp: ftplib.FTP = _FTPS(context=ssl.create_default_context(), **options)
        else:
            ftp = ftplib.FTP(**options)  # noqa: S321 - likewise
        stack.enter_context(closing(ftp))
        ftp.connect(uri.host, uri.port or ftplib.FTP_PORT)
        register(ftp.sock)
        ftp.login(uri.user or "anonymous", uri.password or "")
        if isinstance(ftp, _FTPS):
            ftp.prot_p()
        ftp.voidcmd("TYPE I")
        yield ftp


_LOGIN = {"530", "532"}  # replies (RFC 959 4.2)
_DENIED = re.compile("denied|permi", re.IGNORECASE)
_CROWDED = re.compile("too many|maximum|no more", re.IGNORECASE)  # also with 530, by ProFTPD, say
_NO_FILE = "550"  # or it may not be read, or is a folder: many servers say the same of all
_UNKNOWN = {"500", "501", "502", "504"}  # to commands that a server does not have


@explain.register
def explain_ftp_error(uri: FTPURI, err: Exception, pin: Version | None = None) -> CheckpointError:
    """Make a `CheckpointError` of a server's reply."""
    if isinstance(err, IsADirectoryError):
        return InvalidURIError(uri, "this is a folder", "add the name of the checkpoint in it")
    if not isinstance(err, ftplib.Error):
        return explain.dispatch(URI)(uri, err, pin)
    code, said = str(err)[:3], str(err)
    is_crowded = code in _LOGIN and _CROWDED.search(said)
    if (code in _LOGIN and not is_crowded) or (code == _NO_FILE and _DENIED.search(said)):
        return AccessDeniedError(uri, f"access is denied ({err})", uri.credentials)
    if code == _NO_FILE or "no such file" in said.lower():
        return no_object(uri, f"there is no such file or folder ({err})")
    if isinstance(err, ftplib.error_perm) and not is_crowded:
        remedy = "is the folder there, and does the server allow that?"
        return CheckpointError(uri, f"the server refuses ({err})", remedy)
    return UnreachableError(uri, f"no useful answer ({err})", "try again later")


@contextmanager
def _telling(ftp: ftplib.FTP, path: str) -> Iterator[None]:
    """Ask what a file is that the server refuses in the block.

    Raises:
        IsADirectoryError: it is a folder.
        PermissionError: it is a file.
    """
    try:
        yield
    except ftplib.error_perm as err:
        if str(err).startswith(_NO_FILE):
            facts = _facts(ftp, path) or {}
            if facts.get("type") == "dir":
                raise IsADirectoryError(errno.EISDIR, "Is a directory") from err
            if facts:
                raise PermissionError(errno.EACCES, str(err)) from err
        raise


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
        with _telling(ftp, uri.path):
            data = stack.enter_context(_retrieved(ftp, uri.path))
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
    with _connected(uri, transport_params) as ftp, _telling(ftp, uri.path):
        version = pinned(uri, _version(ftp, uri.path), pin)
        start = max(0, version.size + offset) if offset < 0 else offset
        if start < version.size:
            data = _retrieved(ftp, uri.path, start)
            with data, data.makefile("rb", buffering=0) as file:
                register(data)
                buffers.readfrom(file)
    return version


def _retrieved(ftp: ftplib.FTP, path: str, start: int = 0) -> Any:
    """Give the connection that a file comes through, from an offset on.

    Raises:
        UnrangedError: the server cannot begin at an offset.
    """
    try:
        return ftp.transfercmd(f"RETR {path}", rest=start or None)
    except ftplib.Error as err:
        if start and (str(err)[:3] in _UNKNOWN or "restart" in str(err).lower()):
            raise UnrangedError from err
        raise


# ── version ───────────────────────────────────────────────────────────────────────────────────


@read_version.register
def read_ftp_version(uri: FTPURI, transport_params: Params = None) -> Version:
    """Ask for a file's size and time."""
    with _connected(uri, transport_params) as ftp, _telling(ftp, uri.path):
        return _version(ftp, uri.path)


def _version(ftp: ftplib.FTP, path: str) -> Version:
    """Ask for size and time (RFC 3659 3 and 4).

    Raises:
        UnrangedError: the server does not tell the size.
    """
    tag = size = None
    try:
        size = ftp.size(path)
    except ftplib.error_perm as err:
        if str(err)[:3] not in _UNKNOWN:
            raise
    if size is None:
        raise UnrangedError
    with suppress(ftplib.error_perm):
        tag = ftp.sendcmd(f"MDTM {path}")
    return Version(size, tag)


# ── list ──────────────────────────────────────────────────────────────────────────────────────


@list_page.register
def list_ftp_folder(
    uri: FTPURI,
    token: str | None = None,  # noqa: ARG001 - a folder is one page
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List a folder with MLSD (RFC 3659 7), or with NLST: what vanishes meanwhile is left out."""
    with _connected(uri, transport_params) as ftp:
        with suppress(ftplib.error_perm):
            ftp.sendcmd("OPTS MLST type;size;modify;unique;")
        folder = posixpath.dirname(uri.path)
        ftp.cwd(folder)
        found = _beneath(ftp, folder, uri.path, set(), recursive=recursive)
        return Page([Entry.beneath(uri, *each) for each in found])


def _beneath(
    ftp: ftplib.FTP, folder: str, beginning: str, above: set[str], *, recursive: bool
) -> Iterator[tuple[str, int | None, datetime | None]]:
    """Give path, size and time of what is in the working folder; links may go in circles."""
    here = _identity(ftp)
    for name, facts in _members(ftp, folder) if here not in above else ():
        path = posixpath.join(folder, name)
        if not f"{path}/".startswith(beginning):
            continue
        if facts.get("type") != "dir":
            yield path, int(facts["size"]) if "size" in facts else None, _time(facts)
        elif not recursive:
            yield f"{path}/", None, None
        elif _enter(ftp, path):
            yield from _beneath(ftp, path, "", above | {here}, recursive=True)


def _enter(ftp: ftplib.FTP, folder: str) -> bool:
    """Make a folder the working one; False if it has vanished."""
    try:
        ftp.cwd(folder)
    except ftplib.error_perm as err:
        if not str(err).startswith(_NO_FILE) or _DENIED.search(str(err)):
            raise
        return False
    return True


def _identity(ftp: ftplib.FTP) -> str:
    """Give what the working folder is known by, whatever links led to it."""
    with suppress(ftplib.error_perm):
        unique = re.search(r"(?i)unique=([^;]+);", ftp.sendcmd("MLST"))
        if unique:
            return unique[1]
    return ftp.pwd()


def _members(ftp: ftplib.FTP, folder: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Give names and facts of what is in the working folder."""
    try:
        listed = list(ftp.mlsd())
    except ftplib.error_perm as err:
        if str(err)[:3] not in _UNKNOWN:
            raise
        listed = [(name, {}) for name in _names(ftp)]
    ftp.voidcmd("TYPE I")  # ftplib lists as text, of which no server tells sizes
    for name, told in listed:
        kind = told.get("type", "").lower()
        if kind in {"cdir", "pdir"} or name in {"", ".", ".."} or "/" in name:
            continue
        is_known = kind in {"file", "dir"}  # and no link
        facts = {**told, "type": kind} if is_known else _facts(ftp, posixpath.join(folder, name))
        if facts:
            yield name, facts


def _names(ftp: ftplib.FTP) -> list[str]:
    try:
        return [path.rpartition("/")[2] for path in ftp.nlst()]
    except (ftplib.error_perm, ftplib.error_temp) as err:
        if str(err)[:3] in {"450", _NO_FILE}:  # as many servers say of an empty folder
            return []
        raise


def _facts(ftp: ftplib.FTP, path: str) -> dict[str, str]:
    """Find out what MLSD would tell of a path; nothing if nothing is there."""
    try:
        ftp.cwd(path)
    except ftplib.error_perm:
        try:
            version = _version(ftp, path)
        except ftplib.error_perm:
            return {}
        except UnrangedError:
            return {"type": "file"}
        return {"type": "file", "size": str(version.size), "modify": (version.tag or "")[4:]}
    return {"type": "dir"}


def _time(facts: dict[str, str]) -> datetime | None:
    """Read a time (RFC 3659 2.3)."""
    digits = re.match(r"\d{14}", facts.get("modify", ""))
    return datetime.strptime(f"{digits[0]}+0000", "%Y%m%d%H%M%S%z") if digits else None


# ── write ─────────────────────────────────────────────────────────────────────────────────────


class _Part:
    """A hidden file beside the target: `parts.Parted`.

    A server that lets nobody write from an offset on, as ProFTPD unless it is told to, gets all
    parts in one transfer. Where that breaks off, it cannot be gone on with.
    """

    def __init__(self, uri: FTPURI, params: Params) -> None:
        self._uri, self._params, self._path = uri, params, hidden_name(uri.path)
        self._resumes = False
        self._transfer: _Upload | None = None

    def begin(self) -> None:
        with _connected(self._uri, self._params) as ftp:
            if _facts(ftp, self._uri.path).get("type") == "dir":
                raise IsADirectoryError(errno.EISDIR, "Is a directory")
            ftp.storbinary(f"STOR {self._path}", io.BytesIO(b"."))
            self._resumes = True
            try:
                ftp.storbinary(f"STOR {self._path}", io.BytesIO(b"."), rest=1)
            except (ftplib.error_perm, ftplib.error_temp):
                self._resumes = False
                ftp.delete(self._path)  # such a server may replace no file either

    def store(self, offset: int, part: bytes) -> None:
        if self._resumes:
            with _connected(self._uri, self._params) as ftp:
                ftp.storbinary(f"STOR {self._path}", io.BytesIO(part), rest=offset or None)
            return
        if not offset:
            self._transfer = _Upload(self._uri, self._params, self._path)
        elif self._transfer is None:
            problem = "the connection was lost, and this server goes on with no upload"
            raise CheckpointError(self._uri, problem, "save it anew")
        transfer, self._transfer = self._transfer, None  # it is of no use once it has failed
        transfer.send(part)
        self._transfer = transfer

    def finish(self, size: int, *, again: bool) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer:
            transfer.finish()
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
                with _telling(ftp, self._uri.path):
                    ftp.rename(path, self._uri.path)

    def remove(self) -> None:
        if self._transfer:
            self._transfer.close()
        with _connected(self._uri, self._params) as ftp, suppress(ftplib.error_perm):
            ftp.delete(self._path)


class _Upload:
    """A file on its way to the server, which is closed where something fails."""

    def __init__(self, uri: FTPURI, params: Params, path: str) -> None:
        with ExitStack() as stack:
            self._ftp = stack.enter_context(_connected(uri, params))
            self._data = stack.enter_context(self._ftp.transfercmd(f"STOR {path}"))
            self.close = stack.pop_all().close

    def send(self, part: bytes) -> None:
        with ExitStack() as stack:
            stack.callback(self.close)
            register(self._data)
            self._data.sendall(part)
            stack.pop_all()

    def finish(self) -> None:
        """Tell the server that this was all, and hear whether it has it."""
        with closing(self):
            register(self._data)
            if isinstance(self._data, ssl.SSLSocket):
                self._data.unwrap()
            self._data.close()
            register(self._ftp.sock)  # instead of a duplicate of the other, which keeps it open
            self._ftp.voidresp()


@open_writer.register
def open_ftp_writer(uri: FTPURI, transport_params: Params = None) -> Writer:
    """Write to a hidden file beside the target, which takes its place when all is written."""
    check_params(uri, transport_params, writing=True)
    return committed(uri, None, functools.partial(PartWriter, _Part(uri, transport_params)))


# ── remove ────────────────────────────────────────────────────────────────────────────────────


@remove_object.register
def remove_ftp_file(uri: FTPURI, transport_params: Params = None) -> None:
    """Remove a file, with DELE."""
    with unless_missing(uri), _connected(uri, transport_params) as ftp, _telling(ftp, uri.path):
        ftp.delete(uri.path)
