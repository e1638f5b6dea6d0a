"""Files on a disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import urllib.parse
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, ClassVar

from attrs import frozen

from _anemoi_ckpt.errors import (
    AccessDeniedError,
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    UnreachableError,
)
from _anemoi_ckpt.globs import suggestion
from _anemoi_ckpt.places import (
    LONGEST_NAME,
    URI,
    Buffers,
    Entry,
    Page,
    Params,
    Version,
    list_page,
    open_stream,
    open_writer,
    pinned,
    read_range,
    register_paths,
    register_scheme,
    remove_object,
    schemes,
)
from _anemoi_ckpt.places.explained import explain, explained

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class LocalURI(URI):
    """A file on a disk: a plain or relative path, ``~``, ``pathlib.Path``, or ``file://``."""

    path: str

    path_field: ClassVar[str] = "path"
    connections: ClassVar[int] = min(4, os.cpu_count() or 1)  # threads that copy
    credentials: ClassVar[str] = "make the file readable for the user who runs this"


# ── parse ─────────────────────────────────────────────────────────────────────────────────────


def parse_path(text: str) -> URI:
    """Parse a plain path.

    Raises:
        InvalidURIError: it is empty.
    """
    if not text:
        raise InvalidURIError("''", "the path is empty", "give the path or URL of a checkpoint")
    return LocalURI(text, os.path.expanduser(text))  # noqa: PTH111 - keeps ./ and // as written


def parse_file_url(text: str) -> URI:
    """Parse ``file:///path/to/file``, percent-encoded (RFC 8089).

    Raises:
        InvalidURIError: it names another machine, or no path.
    """
    url = urllib.parse.urlsplit(text)
    if url.netloc not in ("", "localhost") or not url.path:
        raise InvalidURIError(text, "names no file on this machine", "write file:///path/to/file")
    return LocalURI(text, urllib.parse.unquote(text.split("://", 1)[1][len(url.netloc) :]))


register_paths(parse_path)
register_scheme("file", parse_file_url)


# ── open ──────────────────────────────────────────────────────────────────────────────────────


@open_stream.register
def open_file(uri: LocalURI, transport_params: Params = None) -> BinaryIO:  # noqa: ARG001 - a file needs none
    """Open a file, unbuffered."""
    with explained(uri):
        stream = open(uri.path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115 - the caller's to close
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            stream.close()
            raise _no_file(uri, _OPEN_IT)
        return stream


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; of a pipe, do not wait for who writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


_INTERRUPTIONS = {  # of network file systems, such as NFS: another attempt may go well
    getattr(errno, name, None)
    for name in ("EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH")
} - {None}


def _explain_os_error(uri: LocalURI, err: OSError) -> CheckpointError:
    if err.errno in {errno.ENXIO, errno.EOPNOTSUPP}:
        return _no_file(uri, _OPEN_IT)  # a socket: the second is what macOS says
    if err.errno in _INTERRUPTIONS:
        remedy = "check the disk, and its mount"
        return UnreachableError(uri, f"the file system did not answer ({err.strerror})", remedy)
    return CheckpointError(uri, f"{err.strerror or err}", "check the disk")


_OPEN_IT = "store it in a file first, or give the open file: open(path, 'rb')"


def _no_file(uri: LocalURI, remedy: str) -> CheckpointError:
    return InvalidURIError(uri, "this is a pipe or a device, not a file", remedy)


@explain.register
def explain_file_error(
    uri: LocalURI,
    err: Exception,
    pin: Version | None = None,  # noqa: ARG001 - `pinned` has compared it
) -> CheckpointError:
    """Make a `CheckpointError` of what the operating system raised."""
    if isinstance(err, FileNotFoundError | NotADirectoryError):
        return _not_found(uri)
    if isinstance(err, IsADirectoryError):
        return InvalidURIError(uri, "this is a folder", "add the name of the checkpoint in it")
    if isinstance(err, PermissionError):
        return AccessDeniedError(uri, "the file may not be read", uri.credentials)
    if isinstance(err, OSError):
        return _explain_os_error(uri, err)
    return CheckpointError(uri, f"{type(err).__name__}: {err}", "check the path")  # a null in it


def _not_found(uri: LocalURI) -> CheckpointError:
    """Say what of a path is not there, and which files beside it have similar names."""
    path = Path(uri.path)
    scheme = uri.path.partition(":/")[0]
    if scheme in schemes():
        return CheckpointNotFoundError(
            uri, f"there is no folder {scheme}:", f"write {scheme}:// with two slashes"
        )
    if not path.parent.is_dir():
        return CheckpointNotFoundError(
            uri, f"the directory {path.parent} does not exist", "check the path"
        )
    if uri.path.endswith("/") and path.is_file():
        remedy = "name a folder, or a glob, which a shell wants in quotes"
        return CheckpointNotFoundError(uri, "this is a file, not a folder", remedy)
    if path.is_symlink():
        problem = f"this link leads to {path.readlink()}, which is not there"
        return CheckpointNotFoundError(uri, problem, "check the link")
    names = (other.name + "/" * other.is_dir() for other in path.parent.iterdir())
    remedy = suggestion(path.name, names) or "check the name"
    kind = "folder" if uri.path.endswith("/") else "file"
    return CheckpointNotFoundError(uri, f"there is no such {kind}", remedy)


# ── range ─────────────────────────────────────────────────────────────────────────────────────


@read_range.register
def read_file_range(
    uri: LocalURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Read a range of a file. Its version is its inode and the time it was last written to."""
    with open_stream(uri, transport_params) as stream, explained(uri):
        status = os.fstat(stream.fileno())
        version = Version(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}")
        pinned(uri, version, pin)
        stream.seek(max(0, version.size + offset) if offset < 0 else offset)
        buffers.readfrom(stream)
    return version


# ── list ──────────────────────────────────────────────────────────────────────────────────────


@list_page.register
def list_folder(
    uri: LocalURI,
    token: str | None = None,  # noqa: ARG001 - a folder is one page
    transport_params: Params = None,  # noqa: ARG001 - a file needs none
    *,
    recursive: bool = False,
) -> Page:
    """List a folder: what vanishes meanwhile is left out."""
    with explained(uri):
        paths = list(_paths(os.path.dirname(uri.path) or ".", uri.path, recursive=recursive))  # noqa: PTH120 - keeps ./ and // as written
    return Page([entry for path in paths for entry in _entries(uri, path)])


def _paths(folder: str, beginning: str, *, recursive: bool) -> Iterator[str]:
    for each in os.scandir(folder):
        path = each.path.removeprefix("./") if not beginning.startswith("./") else each.path
        if each.is_dir():
            path += "/"
        if path.startswith(beginning):
            deeper = recursive and each.is_dir(follow_symlinks=False)  # links may go in circles
            with suppress(FileNotFoundError):
                yield from _paths(path, path, recursive=True) if deeper else [path]


def _entries(uri: LocalURI, path: str) -> Iterator[Entry]:
    if path.endswith("/"):
        yield Entry.beneath(uri, path)
        return
    with suppress(FileNotFoundError):
        status = Path(path).stat()
        modified = datetime.fromtimestamp(status.st_mtime, UTC)
        yield Entry.beneath(uri, path, status.st_size, modified)


# ── write ─────────────────────────────────────────────────────────────────────────────────────


@open_writer.register
@contextmanager
def open_file_writer(uri: LocalURI, transport_params: Params = None) -> Iterator[BinaryIO]:  # noqa: ARG001 - a file needs none
    """Write to a hidden file beside the target, which takes its place when all is written.

    Where the target is a link, what it leads to is replaced; permissions are kept.
    """
    path = Path(os.path.realpath(uri.path))
    if os.path.isdir(path) or uri.path.endswith(os.sep):  # noqa: PTH112 - no name is too long
        raise InvalidURIError(uri, "this is a folder", "add the name of the checkpoint to write")
    _refuse_device(uri)
    part = hidden(path, f"{uuid.uuid4().hex}.part")  # no other call's
    try:
        with explained_writing(uri), part.open("wb") as stream:
            yield stream
        with explained_writing(uri):
            if path.exists():
                shutil.copymode(path, part)
            part.replace(path)
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            part.unlink()


def _refuse_device(uri: LocalURI) -> None:
    """Refuse to put a file in the place of a pipe or a device."""
    with explained_writing(uri), suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(uri.path).st_mode):  # noqa: PTH116 - no name is too long
            raise _no_file(uri, "save it to a file, and copy that there")


def hidden(path: Path, ending: str) -> Path:
    """Name a hidden file beside a file, no matter how long the file's own name is."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.{ending}"
    return path.with_name(name)


@contextmanager
def explained_writing(uri: LocalURI) -> Iterator[None]:
    """Turn what the operating system raises while a file is written into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as err:
        kind = AccessDeniedError if isinstance(err, PermissionError) else CheckpointError
        kind = CheckpointNotFoundError if isinstance(err, FileNotFoundError) else kind
        remedy = "check the folder, its permissions and the room on the disk"
        raise kind(uri, f"it cannot be written ({err.strerror or err})", remedy) from err


# ── remove ────────────────────────────────────────────────────────────────────────────────────


@remove_object.register
def remove_file(uri: LocalURI, transport_params: Params = None) -> None:  # noqa: ARG001 - a file needs none
    """Remove a file. A link is removed, not what it leads to."""
    with explained(uri), suppress(FileNotFoundError, NotADirectoryError):
        Path(uri.path).unlink()
