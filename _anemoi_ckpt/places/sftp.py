"""Files on a host that SSH reaches, through paramiko's SFTP (draft-ietf-secsh-filexfer-02)."""

from __future__ import annotations

import errno
import functools
import io
import os
import posixpath
import re
import stat
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, BinaryIO, ClassVar

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
    Version,
    Writer,
    check_params,
    connect,
    forget_clients,
    imported,
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
from _anemoi_ckpt.places.explained import explain, explained, no_object
from _anemoi_ckpt.places.parts import PartWriter, hidden_name
from _anemoi_ckpt.places.ssh import CHANNELS, Login, Server, UnknownHostKeyError
from _anemoi_ckpt.places.uploading import committed

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class SFTPURI(URI):
    """A file on a host: ``sftp://[user[:password]@]host[:port]/path``, percent-encoded.

    ``ssh://`` and ``scp://`` are other names of it. The path begins at the host's root.
    """

    host: str
    path: str
    port: int | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    connections: ClassVar[int] = CHANNELS
    path_field: ClassVar[str] = "path"
    is_quoted: ClassVar[bool] = True
    extra: ClassVar[str | None] = "sftp"
    params: ClassVar[tuple[str, ...] | None] = (
        *("host", "port", "user", "password", "connect_kwargs", "max_concurrency"),
        *("prefetch_kwargs", "buffer_size"),  # of smart-open's own reader
    )
    credentials: ClassVar[str] = (
        "log in with `ssh` first: its agent, keys and ~/.ssh/config are used here, too; or give a "
        "password in the URL, or transport_params={'connect_kwargs': {'key_filename': …}}"
    )


# ── parse ─────────────────────────────────────────────────────────────────────────────────────

_URL = re.compile(  # no query: a question mark is of the path
    r"\w+://(?:([^/@:]*)(?::([^/@]*))?@)?(\[[^]/]+\]|[^/@:[\]]+)(?::(\d+))?/(.*)", re.DOTALL
)


def parse_host_url(text: str) -> tuple[str, str, int | None, str | None, str | None]:
    """Take host, path, port, user and password out of a URL.

    Raises:
        InvalidURIError: it names no host or no file, or has another character than it may.
    """
    match = _URL.fullmatch(text)
    if match is None:
        raise InvalidURIError(
            text,
            "is no URL of a file on a host",
            "write scheme://user@host/path/to/file, and percent-encode what is special in the "
            "user and the password",
        )
    user, password, host, port, path = match.groups()
    if path.endswith("/") or not path:
        raise InvalidURIError(text, "names a folder", "add the name of the checkpoint in it")
    user, password = (each and urllib.parse.unquote(each) for each in (user, password))
    path = "/" + urllib.parse.unquote(path)
    return host.strip("[]"), path, int(port) if port else None, user, password


def parse_sftp(text: str) -> URI:
    """Parse ``sftp://[user[:password]@]host[:port]/path``.

    Raises:
        InvalidURIError: as `parse_host_url`.
    """
    return SFTPURI(text, *parse_host_url(text))


for _scheme in ("sftp", "ssh", "scp"):
    register_scheme(_scheme, parse_sftp)


# ── client ────────────────────────────────────────────────────────────────────────────────────


_making = threading.Lock()  # or each of many threads would make one


@functools.lru_cache(maxsize=8)
def _server(login: Login, paramiko: Any, _home: str, _pid: int) -> Server:
    return Server(login, paramiko)


def _server_of(uri: SFTPURI, params: Params) -> Server:
    check_params(uri, params)
    given: Mapping[str, Any] = params or {}
    login = Login(
        given.get("host") or uri.host,
        given.get("port") or uri.port,
        given.get("user") or uri.user,
        given.get("password") or uri.password,
        given.get("connect_kwargs") or {},
    )
    home = os.path.expanduser("~")  # noqa: PTH111 - a text
    with _making:
        return _server(login, imported("paramiko", uri), home, os.getpid())


@contextmanager
def _channel(uri: SFTPURI, params: Params) -> Iterator[Any]:
    """Give paramiko's `SFTPClient`. What goes wrong in the block is explained."""
    with explained(uri), _server_of(uri, params).channel(timeout_of(params)) as sftp:
        yield sftp


@connect.register
def connect_sftp(uri: SFTPURI, transport_params: Params = None) -> None:
    """Connect to the host, and log in."""
    with explained(uri):
        _server_of(uri, transport_params).connect(timeout_of(transport_params))


@forget_clients.register
def forget_sftp_servers(uri: SFTPURI) -> None:  # noqa: ARG001 - all of them
    """Forget the connections; those that are in use are used to their end."""
    _server.cache_clear()


@explain.register
def explain_sftp_error(uri: SFTPURI, err: Exception, pin: Version | None = None) -> CheckpointError:
    """Make a `CheckpointError` of what paramiko raised."""
    if isinstance(err, FileNotFoundError):
        return no_object(uri, "there is no such file or folder")
    if isinstance(err, IsADirectoryError):
        return InvalidURIError(uri, "this is a folder", "add the name of the checkpoint in it")
    names = {each.__name__ for each in type(err).__mro__}
    if isinstance(err, UnknownHostKeyError) or "SSHException" in names:
        return _explain_ssh_error(uri, err, names)
    return explain.dispatch(URI)(uri, err, pin)


_NO_WAY_IN = "No authentication methods"  # says paramiko where there is neither key nor password


def _explain_ssh_error(uri: SFTPURI, err: Exception, names: set[str]) -> CheckpointError:
    is_late = "timeout" in str(err).lower()
    if ("AuthenticationException" in names and not is_late) or _NO_WAY_IN in str(err):
        return AccessDeniedError(uri, f"the host refuses the login ({err})", uri.credentials)
    problem, remedy = f"no useful answer ({err or type(err).__name__})", "check host and network"
    if isinstance(err, UnknownHostKeyError):
        problem = f"the host is not among those that are known: {err}"
        remedy = f"connect once with `ssh {uri.host}`, and compare the key, so that it is known"
    if "BadHostKeyException" in names:
        problem = "the host has another key than the one that is known"
        remedy = "ask whose host it is: somebody may have put another in its place"
    found = UnreachableError(uri, problem, remedy)
    found.lasting = isinstance(err, UnknownHostKeyError) or "BadHostKeyException" in names
    return found


# ── open ──────────────────────────────────────────────────────────────────────────────────────

_READ_BYTES = 255 * 1024  # in one answer, at most: OpenSSH's limit; other servers answer with less


def _opened(sftp: Any, path: str) -> tuple[Any, Version]:
    """Open a file, and tell its version."""
    try:
        file = sftp.open(path, "rb")
    except OSError as err:
        if err.errno is None:  # as some servers answer of a folder; others open it
            _version(sftp.stat(path))
        raise
    file.MAX_REQUEST_SIZE = _READ_BYTES
    return file, _version(file.stat())


def _version(status: Any) -> Version:
    """Tell a file's version: its size, and the second that it was last written in."""
    if stat.S_ISDIR(status.st_mode or 0):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    return Version(status.st_size, str(status.st_mtime) if status.st_mtime else None)


class _File(io.RawIOBase):
    """A file that is read, with the channel that it is read through."""

    def __init__(self, uri: SFTPURI, file: Any, stack: ExitStack) -> None:
        self._uri, self._file, self._stack = uri, file, stack

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            with explained(self._uri):
                return int(self._file.readinto(buffer))
        except BaseException:
            self._file.sftp.close()  # an answer may still be on its way
            raise

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stack.close()


@open_stream.register
def open_sftp(uri: SFTPURI, transport_params: Params = None) -> BinaryIO:
    """Open a file for reading."""
    with ExitStack() as stack:
        sftp = stack.enter_context(_channel(uri, transport_params))
        file, _ = _opened(sftp, uri.path)
        stack.callback(file.close)
        return io.BufferedReader(_File(uri, file, stack.pop_all()), CHUNK_BYTES)


# ── range ─────────────────────────────────────────────────────────────────────────────────────


@read_range.register
def read_sftp_range(
    uri: SFTPURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Read a range of a file."""
    with _channel(uri, transport_params) as sftp:
        file, version = _opened(sftp, uri.path)
        with file:
            pinned(uri, version, pin)
            file.seek(max(0, version.size + offset) if offset < 0 else min(offset, version.size))
            buffers.readfrom(file)
    return version


# ── version ───────────────────────────────────────────────────────────────────────────────────


@read_version.register
def read_sftp_version(uri: SFTPURI, transport_params: Params = None) -> Version:
    """Ask for a file's size and time."""
    with _channel(uri, transport_params) as sftp:
        return _version(sftp.stat(uri.path))


# ── list ──────────────────────────────────────────────────────────────────────────────────────


@list_page.register
def list_sftp_folder(
    uri: SFTPURI,
    token: str | None = None,  # noqa: ARG001 - a folder is one page
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List a folder: what vanishes meanwhile is left out."""
    with _channel(uri, transport_params) as sftp:
        found = _beneath(sftp, posixpath.dirname(uri.path), uri.path, recursive=recursive)
        return Page([Entry.beneath(uri, *each) for each in found])


def _beneath(
    sftp: Any, folder: str, beginning: str, *, recursive: bool
) -> Iterator[tuple[str, int | None, datetime | None]]:
    """Give path, size and time of what is in a folder; links to folders may go in circles."""
    for listed in sftp.listdir_attr(folder):
        path, status = posixpath.join(folder, listed.filename), listed
        if not path.startswith(beginning) and not f"{path}/".startswith(beginning):
            continue
        is_link = stat.S_ISLNK(listed.st_mode or 0)
        if is_link:
            with suppress(FileNotFoundError):
                status = sftp.stat(path)
        if stat.S_ISDIR(status.st_mode or 0):
            if recursive and not is_link:
                with suppress(FileNotFoundError):
                    yield from _beneath(sftp, path, "", recursive=True)
            else:
                yield f"{path}/", None, None
        elif not stat.S_ISLNK(status.st_mode or 0):  # which leads nowhere
            modified = datetime.fromtimestamp(status.st_mtime, UTC) if status.st_mtime else None
            yield path, status.st_size, modified


# ── write ─────────────────────────────────────────────────────────────────────────────────────


class _Part:
    """A hidden file beside the target: `parts.Parted`."""

    def __init__(self, uri: SFTPURI, params: Params) -> None:
        self._uri, self._params = uri, params
        self._target = uri.path
        self._path = hidden_name(uri.path)

    def begin(self) -> None:
        with _channel(self._uri, self._params) as sftp:
            with suppress(FileNotFoundError):
                self._target = sftp.normalize(self._uri.path)  # what a link leads to
                self._path = hidden_name(self._target)
                _version(sftp.stat(self._target))
            sftp.open(self._path, "wb").close()

    def store(self, offset: int, part: bytes) -> None:
        """Write at the offset; when its last request is answered, all before have gone well."""
        with _channel(self._uri, self._params) as sftp, sftp.open(self._path, "r+b") as file:
            file.seek(offset)
            file.set_pipelined(True)
            file.write(part[:-1])
            file.set_pipelined(False)
            file.write(part[-1:])

    def finish(self, size: int, *, again: bool) -> None:
        with _channel(self._uri, self._params) as sftp:
            path = self._path
            if again and not _is_there(sftp, path):
                path = self._target
            found = sftp.stat(path).st_size
            if found != size:
                raise EOFError(f"{found} bytes of {size} are there")
            if path != self._target:
                with suppress(FileNotFoundError):
                    sftp.chmod(path, stat.S_IMODE(sftp.stat(self._target).st_mode or 0o644))
                _replace(sftp, path, self._target)

    def remove(self) -> None:
        with _channel(self._uri, self._params) as sftp:
            with suppress(OSError):  # nothing is aside, or the target is there
                sftp.rename(_aside(self._path), self._target)
            with suppress(FileNotFoundError):
                sftp.remove(self._path)


def _aside(path: str) -> str:
    """Name what a target is called while another file takes its place in two steps."""
    return f"{path}.old"


def _is_there(sftp: Any, path: str) -> bool:
    try:
        sftp.stat(path)
    except FileNotFoundError:
        return False
    return True


def _replace(sftp: Any, path: str, target: str) -> None:
    """Rename a file to another's name: at once where the server is OpenSSH's, else in two steps."""
    try:
        sftp.posix_rename(path, target)
    except OSError as err:
        if err.errno is not None:
            raise
        aside = _aside(path)
        with suppress(FileNotFoundError):
            sftp.rename(target, aside)
        try:
            sftp.rename(path, target)
        except OSError:
            with suppress(FileNotFoundError):
                sftp.rename(aside, target)
            raise
        with suppress(FileNotFoundError):
            sftp.remove(aside)


@open_writer.register
def open_sftp_writer(uri: SFTPURI, transport_params: Params = None) -> Writer:
    """Write to a hidden file beside the target, which takes its place when all is written."""
    check_params(uri, transport_params, writing=True)
    part = _Part(uri, transport_params)
    return committed(uri, None, functools.partial(PartWriter, part))


# ── remove ────────────────────────────────────────────────────────────────────────────────────


@remove_object.register
def remove_sftp_file(uri: SFTPURI, transport_params: Params = None) -> None:
    """Remove a file. A link is removed, not what it leads to."""
    with _channel(uri, transport_params) as sftp, suppress(FileNotFoundError):
        sftp.remove(uri.path)
