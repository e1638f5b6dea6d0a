"""Files in Hadoop's file system: through its program `hdfs`, or by HTTP (Hadoop's WebHDFS API)."""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO, ClassVar, cast

from attrs import evolve, field, frozen

from _anemoi_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    MissingPackageError,
    UnreachableError,
)
from _anemoi_ckpt.places import (
    URI,
    Buffers,
    Entry,
    Page,
    Params,
    UnrangedError,
    Version,
    Writer,
    check_params,
    imported,
    list_page,
    open_stream,
    open_writer,
    pinned,
    read_range,
    read_version,
    register_scheme,
    remove_object,
    sibling,
)
from _anemoi_ckpt.places.explained import explain, explained, no_object, unless_missing
from _anemoi_ckpt.places.http import HTTPURI, request
from _anemoi_ckpt.places.parts import PartWriter, hidden_name
from _anemoi_ckpt.places.responses import read_socket
from _anemoi_ckpt.places.uploading import committed

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class HDFSURI(URI):
    """A file that the program `hdfs` reads: ``hdfs://[host[:port]]/path``, ``viewfs://…``."""

    connections: ClassVar[int] = 1  # each read starts a virtual machine of Java
    params: ClassVar[tuple[str, ...] | None] = ()
    credentials: ClassVar[str] = "log in, with kinit say, so that `hdfs dfs -ls` may see it"

    @property
    def location(self) -> str:
        """What the program is told: without a host, that of its configuration.

        It takes each path for a glob, with a backslash before what is none.
        """
        scheme, _, rest = self.text.partition("://")
        rest = re.sub(r"([*?{}\[\]\\])", r"\\\1", rest)
        return rest if rest.startswith("/") else f"{scheme.lower()}://{rest}"


@frozen
class WebHDFSURI(HTTPURI):
    """A file behind a name node: ``webhdfs://[user@]host:port/path[?delegation=…]``."""

    path: str = ""
    operation: str = field(default="op=OPEN", repr=False)

    path_field: ClassVar[str] = "path"
    is_url: ClassVar[bool] = False  # the path is not; the text is
    writer_params: ClassVar[tuple[str, ...]] = ("min_part_size",)  # of smart-open's own writer
    credentials: ClassVar[str] = "give the user in the URL: webhdfs://user@host:port/path"

    @property
    def url(self) -> str:
        """The URL of an operation, which the name node redirects to a data node."""
        given = urllib.parse.urlsplit(self.text)
        user, at, host = given.netloc.rpartition("@")
        named = f"user.name={urllib.parse.quote(urllib.parse.unquote(user))}" if at else ""
        query = "&".join(filter(None, (self.operation, named, given.query)))
        return f"http://{host}/webhdfs/v1{urllib.parse.quote(self.path)}?{query}"


# ── parse ─────────────────────────────────────────────────────────────────────────────────────


def parse_hdfs(text: str) -> URI:
    """Parse ``hdfs://[host[:port]]/path``, or ``webhdfs://[user@]host:port/path``.

    Raises:
        InvalidURIError: it names no host, or no file; or a password, which WebHDFS does not take.
    """
    scheme, _, rest = text.partition("://")
    host, _, path = rest.partition("?")[0].partition("/")
    is_web = scheme.lower() == "webhdfs"
    if (is_web and not host) or not path or path.endswith("/"):
        raise InvalidURIError(text, "names no file", f"write {scheme}://host:port/path/to/file")
    if not is_web:
        return HDFSURI(text)
    if ":" in host.rpartition("@")[0]:
        remedy = f"write {scheme}://user@host:port/path, or give a token: ?delegation=…"
        raise InvalidURIError(text, "WebHDFS takes no password", remedy)
    return WebHDFSURI(text, urllib.parse.unquote(urllib.parse.urlsplit(text).path))


for _scheme in ("hdfs", "viewfs", "webhdfs"):
    register_scheme(_scheme, parse_hdfs)


# ── the program ───────────────────────────────────────────────────────────────────────────────

_PROGRAM = "hdfs"


def _require_program(uri: HDFSURI, params: Params) -> None:
    check_params(uri, params, writing=True)
    if shutil.which(_PROGRAM) is None:
        raise MissingPackageError(
            uri, f"the program {_PROGRAM} is not there", "install Hadoop's client, and set PATH"
        )


def _ran(uri: HDFSURI, params: Params, *arguments: str) -> str:
    """Run the program, and give what it prints."""
    _require_program(uri, params)
    command = [_PROGRAM, "dfs", *arguments]
    ended = subprocess.run(command, check=False, stdout=subprocess.PIPE)  # noqa: S603 - the user's own
    if ended.returncode:
        raise OSError(f"exit status {ended.returncode}")
    return ended.stdout.decode(errors="surrogateescape")


def _opened(uri: HDFSURI, mode: str, params: Params) -> Any:
    _require_program(uri, params)
    hdfs = imported("smart_open.hdfs", uri)
    if not hasattr(hdfs.CliRawOutputBase, "terminate"):  # and no reader closes its pipe
        problem = "smart-open before 9 leaves half a file in Hadoop where a write fails"
        raise MissingPackageError(uri, problem, "pip install 'smart-open>=9'")
    return hdfs.open(uri.location, mode)


@explain.register
def explain_hdfs_error(uri: HDFSURI, err: Exception, pin: Version | None = None) -> CheckpointError:
    """Ask the program whether the file is there: it fails with the same status for all reasons."""
    if not isinstance(err, OSError):
        return explain.dispatch(URI)(uri, err, pin)
    asked = subprocess.run([_PROGRAM, "dfs", "-test", "-e", uri.location], check=False)  # noqa: S603 - the user's own
    if asked.returncode == 1:
        return no_object(uri, "there is no such file")
    remedy = f"see what it says; {uri.credentials}"
    return CheckpointError(uri, f"{_PROGRAM} failed ({err})", remedy)


@open_stream.register
def open_hdfs(uri: HDFSURI, transport_params: Params = None) -> BinaryIO:
    """Open what `hdfs dfs -cat` gives."""
    with explained(uri):
        return cast("BinaryIO", _opened(uri, "rb", transport_params))


@read_range.register
def read_hdfs_range(
    uri: HDFSURI,
    offset: int,  # noqa: ARG001 - it is read whole
    buffers: Buffers,  # noqa: ARG001 - likewise
    pin: Version | None = None,  # noqa: ARG001 - likewise
    transport_params: Params = None,
) -> Version:
    """Tell that the program gives the whole file alone."""
    check_params(uri, transport_params)
    raise UnrangedError


_LISTED = re.compile(  # by FileSystemShell's ls: permissions, copies, owners, bytes, time, path
    r"([d-])\S+ .*? (\d+) (\d{4}-\d\d-\d\d \d\d:\d\d) (.+)"
)


@list_page.register
def list_hdfs_folder(
    uri: HDFSURI,
    token: str | None = None,  # noqa: ARG001 - a folder is one page
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List with `hdfs dfs -ls`, which tells times to the minute, in the zone of this machine."""
    folder: Any = sibling(uri, "")
    options = ["-R"] if recursive else []
    with explained(folder):
        printed = _ran(folder, transport_params, "-ls", *options, folder.location)
    entries = []
    for kind, size, time, path in _LISTED.findall(printed):
        within = posixpath.relpath(_path(path), _path(folder.text))
        beneath = posixpath.join(folder.text, within)
        if not f"{beneath}/".startswith(uri.text):
            continue
        if kind == "d":
            entries.append(Entry.beneath(uri, f"{beneath}/"))
        else:
            modified = datetime.strptime(time, "%Y-%m-%d %H:%M").astimezone(UTC)
            entries.append(Entry.beneath(uri, beneath, int(size), modified))
    return Page(entries)


def _path(text: str) -> str:
    """Give the path of a URL, or of what is one already."""
    return "/" + re.sub(r"^\w+://[^/]*", "", text).strip("/")


@remove_object.register
def remove_hdfs_file(uri: HDFSURI, transport_params: Params = None) -> None:
    """Remove with `hdfs dfs -rm`: into the trash, where Hadoop has one."""
    with explained(uri):
        _ran(uri, transport_params, "-rm", "-f", uri.location)


@open_writer.register
def open_hdfs_writer(uri: HDFSURI, transport_params: Params = None) -> Writer:
    """Write with `hdfs dfs -put`, which gives the file its name when all is written."""
    return committed(uri, None, lambda _: _opened(uri, "wb", transport_params))


# ── by HTTP ───────────────────────────────────────────────────────────────────────────────────


def _asked(uri: WebHDFSURI, method: str, operation: str, params: Params) -> Any:
    """Ask the name node; give what it says, if that is JSON."""
    with request(method, evolve(uri, operation=operation), params) as response:
        _require_ok(response)
        return json.loads(response.content or b"{}")


def _require_ok(response: Any) -> None:
    if not response.ok:
        _ = response.content  # in which the server says why: it is read before it is closed
    response.raise_for_status()


_BUSY = {"StandbyException", "SafeModeException", "RetriableException"}  # though they come with 403


@explain.register
def explain_webhdfs_error(
    uri: WebHDFSURI, err: Exception, pin: Version | None = None
) -> CheckpointError:
    """Make a `CheckpointError` of an answer, with what the name node says in it."""
    found = explain.dispatch(URI)(uri, err, pin)
    try:
        told = err.response.json()["RemoteException"]  # type: ignore[attr-defined] # of requests'
        name, said = told["exception"], str(told["message"]).partition("\n")[0]
    except (AttributeError, LookupError, TypeError, ValueError):
        return found
    if name in _BUSY:
        remedy = "name the active name node, or try again later"
        return UnreachableError(uri, f"the name node gives nothing now ({said})", remedy)
    found.problem += f": {said}"
    found.name_place(found.place)
    return found


def _sent(uri: WebHDFSURI, method: str, operation: str, data: bytes, params: Params) -> None:
    """Ask the name node for a data node, and send it the bytes."""
    with request(method, evolve(uri, operation=operation), params) as response:
        _require_ok(response)
        location = response.headers.get("Location")
    if location is None:
        problem = "the server names no data node to write to"
        raise CheckpointError(uri, problem, "is a name node, or HttpFS, at this port?")
    headers = {"Content-Type": "application/octet-stream"}
    with request(method, HTTPURI(location), params, headers, data) as response:
        _require_ok(response)


@read_version.register
def read_webhdfs_version(uri: WebHDFSURI, transport_params: Params = None) -> Version:
    """Ask for a file's size and time."""
    with explained(uri):
        status = _asked(uri, "GET", "op=GETFILESTATUS", transport_params)["FileStatus"]
    if status.get("type") == "DIRECTORY":
        raise InvalidURIError(uri, "this is a folder", "add the name of the checkpoint in it")
    return Version(status["length"], str(status["modificationTime"]))


@read_range.register
def read_webhdfs_range(
    uri: WebHDFSURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Read a range, which the data node does not tell the version of: it is asked for before."""
    version = pinned(uri, read_version(uri, transport_params), pin)
    start = max(0, version.size + offset) if offset < 0 else offset
    length = min(buffers.size - buffers.filled, version.size - start)
    if length > 0:
        ranged = evolve(uri, operation=f"op=OPEN&offset={start}&length={length}")
        with explained(uri, pin), request("GET", ranged, transport_params) as response:
            _require_ok(response)
            if int(response.headers.get("Content-Length", length)) > length:
                raise UnrangedError
            read_socket(response.raw, buffers)
    return version


@list_page.register
def list_webhdfs_folder(
    uri: WebHDFSURI,
    token: str | None = None,  # noqa: ARG001 - a folder is one page
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List a folder with LISTSTATUS, and those beneath it."""
    with explained(uri):
        found = _beneath(uri, posixpath.dirname(uri.path), transport_params, recursive=recursive)
        return Page([Entry.beneath(uri, *each) for each in found if each[0].startswith(uri.path)])


def _beneath(
    uri: WebHDFSURI, folder: str, params: Params, *, recursive: bool
) -> Iterator[tuple[str, int | None, datetime | None]]:
    """Give path, size and time of what is in a folder."""
    asked = evolve(uri, path=folder)
    statuses = _asked(asked, "GET", "op=LISTSTATUS", params)["FileStatuses"]["FileStatus"]
    for status in statuses:
        path = posixpath.join(folder, status["pathSuffix"])
        if status["type"] != "DIRECTORY":
            modified = datetime.fromtimestamp(status["modificationTime"] / 1000, UTC)
            yield path, status["length"], modified
        elif recursive:
            with unless_missing(uri):
                yield from _beneath(uri, path, params, recursive=True)
        else:
            yield f"{path}/", None, None


class _Part:
    """A hidden file beside the target: `parts.Parted`."""

    def __init__(self, uri: WebHDFSURI, params: Params) -> None:
        self._uri, self._params = uri, params
        self._part: Any = sibling(uri, posixpath.basename(hidden_name(uri.path)))

    def begin(self) -> None:
        _sent(self._part, "PUT", "op=CREATE&overwrite=true", b"", self._params)

    def store(self, offset: int, part: bytes) -> None:
        size = read_version(self._part, self._params).size
        if size == offset:
            _sent(self._part, "POST", "op=APPEND", part, self._params)
        elif size != offset + len(part):  # or an attempt before has appended it
            raise EOFError(f"{size} bytes of {offset} are there")

    def finish(self, size: int, *, again: bool) -> None:
        target = urllib.parse.quote(self._uri.path, safe="")
        try:
            found = read_version(self._part, self._params).size
        except CheckpointNotFoundError:
            if not again:
                raise
            found = read_version(self._uri, self._params).size
            target = ""
        if found != size:
            raise EOFError(f"{found} bytes of {size} are there")
        if target:
            operation = f"op=RENAME&destination={target}&renameoptions=OVERWRITE"
            if _asked(self._part, "PUT", operation, self._params).get("boolean") is False:
                problem = "the server replaces no file that is there"
                raise CheckpointError(self._uri, problem, "remove it first, or use another name")

    def remove(self) -> None:
        _asked(self._part, "DELETE", "op=DELETE", self._params)


@open_writer.register
def open_webhdfs_writer(uri: WebHDFSURI, transport_params: Params = None) -> Writer:
    """Write to a hidden file beside the target, which takes its place when all is written."""
    check_params(uri, transport_params, writing=True)
    params = {k: v for k, v in (transport_params or {}).items() if k != "min_part_size"}
    return committed(uri, None, partial(PartWriter, _Part(uri, params)))


@remove_object.register
def remove_webhdfs_file(uri: WebHDFSURI, transport_params: Params = None) -> None:
    """Remove a file. DELETE takes an empty folder, too, so it is asked what is there before."""
    with unless_missing(uri):
        read_version(uri, transport_params)
        _asked(uri, "DELETE", "op=DELETE", transport_params)
