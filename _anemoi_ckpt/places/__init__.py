"""Where a checkpoint can be, and the verbs that every kind of place answers.

A kind of place is a frozen class and a module of its own, in one order: URI, parse, client, open,
range, version, list, write, remove. Each module registers its handlers with the verbs below
(`functools`' singledispatch) and its schemes with `register_scheme`. `anemoi_ckpt` imports them
all.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from datetime import datetime
from types import ModuleType
from typing import Any, BinaryIO, ClassVar, TypeAlias

from attrs import evolve, field, fields, frozen

from _anemoi_ckpt.errors import (
    ChangedError,
    CheckpointError,
    InvalidURIError,
    MissingPackageError,
    redact,
)

Params = Mapping[str, Any] | None  # smart-open's transport_params
_Place: TypeAlias = "str | os.PathLike[str] | URI"
Notify = Callable[[int], object]  # told how many bytes have come, each time some have
Writer = AbstractContextManager[BinaryIO]

CONNECTIONS = 32  # at once: stores limit each connection (to 80 MB/s or so), not their sum
LONG_PART_BYTES = 64 * 1024**2  # most for one request, so that all connections end together
CHUNK_BYTES = 1024**2  # of one readinto: how often progress is told and interrupts are heard
CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")  # how names of checkpoints end
TIMEOUT_SECONDS = 60.0  # of silence on a connection, after which it counts as lost


# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class URI:
    """A place, as the user wrote it. Each kind of place is a frozen subclass.

    ``str(uri)`` is the text it was parsed from, secrets included; ``repr(uri)`` hides them.
    """

    text: str

    connections: ClassVar[int] = CONNECTIONS
    path_field: ClassVar[str] = "text"  # which field ends with the file's name
    is_url: ClassVar[bool] = False  # whether that is percent-encoded, and has a query
    is_quoted: ClassVar[bool] = False  # whether its text is percent-encoded, and has no query
    asked_first: ClassVar[bool] = False  # whether a read must know the object's version, or size
    extra: ClassVar[str | None] = None  # which `pip install 'anemoi-ckpt[extra]'` it needs
    credentials: ClassVar[str] = "check your permissions"  # what to do when access is denied
    is_users: ClassVar[bool] = False  # whether the user's own code reads it
    when_changed: ClassVar[str] = "load it again, once it is no longer written to"
    # which transport_params are read, and which others when it is written; None: nobody knows
    params: ClassVar[tuple[str, ...] | None] = None
    writer_params: ClassVar[tuple[str, ...]] = ()
    nested_params: ClassVar[
        Mapping[str, tuple[str, ...]]
    ] = {}  # which keys those have that are dicts

    def __init_subclass__(cls) -> None:
        """Give each kind of place this repr: attrs keeps one that is there."""
        if "__repr__" not in vars(cls):
            cls.__repr__ = URI.__repr__  # type: ignore[method-assign] # for each subclass

    def __repr__(self) -> str:
        """Show all fields, without secrets: a signature may stand in a key or path, too."""
        shown = [each.name for each in fields(type(self)) if each.repr]
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return redact(f"{type(self).__name__}({values})")

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return path_of(self).rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        """Give back the text as it was written."""
        return self.text


def path_of(uri: URI) -> str:
    """Give a place's path in its bucket, on its host or on the disk."""
    return str(getattr(uri, uri.path_field))


# ── parse ─────────────────────────────────────────────────────────────────────────────────────

_PARSERS: dict[str, Callable[[str], URI]] = {}  # by scheme; "" is that of plain paths
_SCHEME = re.compile(  # MLflow's own are followed by one slash
    r"(runs|models|mlflow-artifacts|[A-Za-z][A-Za-z0-9+.-]+(?=://)):/.*", re.DOTALL
)


def parse_uri(place: str | os.PathLike[str] | URI | Entry) -> URI:
    """Tell what kind of place a text names.

    Args:
        place: a path, a URL, a URI that was parsed before, or what a listing tells of an object.

    Raises:
        TypeError: the place is neither text nor a path.
        InvalidURIError: the scheme is unknown, the bucket or the key is empty, or the text names
            a folder.

    >>> parse_uri("s3://bucket/run/last.ckpt").key
    'run/last.ckpt'
    >>> parse_uri("last.ckpt")
    LocalURI(text='last.ckpt', path='last.ckpt')
    """
    if isinstance(place, URI):
        return place
    if isinstance(place, Entry):
        return place.uri
    if not isinstance(place, str | os.PathLike):
        raise TypeError(
            "where a checkpoint is, is a text or a path, such as 's3://bucket/last.ckpt', not"
            f" {type(place).__name__}{_advice(place)}"
        )
    text = os.fspath(place)
    match = _SCHEME.fullmatch(text) if isinstance(place, str) else None
    if match is None:
        return _PARSERS[""](text)
    parser = _PARSERS.get(match[1].lower())
    if parser is None:
        raise InvalidURIError(
            text,
            f"the scheme {match[1]}:// is unknown (known: {', '.join(schemes())}, and plain paths)",
            f"add it with register_scheme({match[1]!r}, parser) and one @open_stream.register",
        )
    try:
        return parser(text)
    except CheckpointError:
        raise
    except ValueError as err:  # such as an IPv6 address without its closing bracket
        raise InvalidURIError(text, f"no URL ({err})", "check it for typing errors") from None


def _advice(place: Any) -> str:
    """Tell what to do with what is no place."""
    if place is None:
        return ": is a variable of the configuration or the environment unset?"
    if isinstance(place, bytes):
        return ": os.fsdecode makes a text of a path, and io.BytesIO a file of a checkpoint's bytes"
    if hasattr(place, "read"):
        return ": give the path of an open file, or write its bytes to a file"
    if isinstance(place, list | tuple):
        return ": give one place, such as the index of a checkpoint in several files"
    if callable(place):
        return ": the place comes first, and then the strategies"
    return ""


def register_scheme(scheme: str, parser: Callable[[str], URI]) -> None:
    """Teach `parse_uri` a new scheme, or replace a known one.

    Args:
        scheme: what stands before ``://``, such as ``"sftp"``.
        parser: text to URI. A subclass of `URI` with no fields of its own is one.

    Raises:
        TypeError: the scheme is no text, or the parser no function.
        ValueError: the scheme is not two or more letters, digits, ``+``, ``.`` and ``-``.
    """
    if not isinstance(scheme, str) or not callable(parser):
        raise TypeError(
            f"register_scheme takes a text and a function, not {scheme!r:.60} and {parser!r:.60}"
        )
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
        raise ValueError(f"{scheme!r} is no scheme: two or more of letters, digits, '+', '.', '-'")
    _PARSERS[scheme.lower()] = parser


def register_paths(parser: Callable[[str], URI]) -> None:
    """Set the parser of texts without a scheme."""
    _PARSERS[""] = parser


def schemes() -> list[str]:
    """List the schemes that are known."""
    return sorted(scheme for scheme in _PARSERS if scheme)


def bucket_and_key(text: str, path: str) -> tuple[str, str]:
    """Split ``bucket/path/to/file``.

    Raises:
        InvalidURIError: one of the two is empty, or the key names a folder.
    """
    bucket, _, key = path.partition("/")
    if not bucket or not key:
        missing = "object" if bucket else "bucket"
        raise InvalidURIError(text, f"names no {missing}", "write scheme://bucket/path/to/file")
    if key.endswith("/"):
        raise InvalidURIError(text, "names a folder", "add the name of the checkpoint in it")
    return bucket, key


_URLS = ("http://", "https://", "file://", "webhdfs://")  # percent-encoded


def sibling(uri: URI, name: str) -> URI:
    """Name another file beside one: in its newest version, with the same credentials."""

    def beside(value: str, is_url: bool) -> str:
        has_query = is_url and not (uri.is_quoted or value.lower().startswith("file:"))
        path, mark, query = value.partition("?") if has_query else (value, "", "")
        folder = path[: len(path) - len(path.rpartition("/")[2])]
        return folder + (urllib.parse.quote(name) if is_url else name) + mark + query

    known = {each.name for each in fields(type(uri))}
    changes: dict[str, Any] = dict.fromkeys(known & {"version_id", "generation", "snapshot"})
    is_encoded = uri.is_url or uri.is_quoted or uri.text.lower().startswith(_URLS)
    changes["text"] = beside(uri.text, is_encoded)
    if uri.path_field != "text":
        changes[uri.path_field] = beside(path_of(uri), uri.is_url)
    return evolve(uri, **changes)


_WITH_QUERY = re.compile(  # with Azure's signature of a URL, or Hadoop's token
    r"((?:az|azure|abfss?|wasbs?|https)://.*?)/?(\?(?:.*&)?sig=.*)|(webhdfs://.*?)/?(\?.*)|(.*?)/?",
    re.DOTALL | re.IGNORECASE,
)


def parse_folder(place: str | os.PathLike[str] | URI) -> URI:
    """Tell what kind of place a folder is in: its path ends with a slash, or is empty.

    Args:
        place: a path or URL of a folder, or a URI, which names one already.

    Raises:
        InvalidURIError: as `parse_uri`.

    >>> parse_folder("s3://bucket/run").key
    'run/'
    """
    if not isinstance(place, str | os.PathLike) or not os.fspath(place):
        return parse_uri(place)  # a URI; or it says what is wrong
    signed, sas, hadoop, query, plain = _WITH_QUERY.fullmatch(os.fspath(place)).groups("")  # type: ignore[union-attr] # every text matches
    return sibling(parse_uri(f"{signed or hadoop or plain}/-{sas or query}"), "")


@functools.singledispatch
def resolve(uri: URI, transport_params: Params = None) -> URI:  # noqa: ARG001 - for handlers
    """Tell where a place's bytes are: a place that refers to other places is asked once a load.

    The result keeps the text that the user wrote.

    Args:
        uri: the place.
        transport_params: as for `open_stream`.

    Raises:
        CheckpointError: as `open_stream`.
    """
    return uri


# ── client ────────────────────────────────────────────────────────────────────────────────────
#
# Clients are made once and reused: one for each process (sockets do not survive a fork) and for
# each setting of the environment that the store's own chain of credentials reads.


@functools.singledispatch
def connect(uri: URI, transport_params: Params = None) -> None:
    """Make the client that many reads at once will want, so that not each of them makes one."""


@functools.singledispatch
def forget_clients(uri: URI) -> None:
    """Make the next call look for credentials anew: the store refused those of the clients."""


def environment(*prefixes: str) -> tuple[tuple[str, str], ...]:
    """Give the variables of the environment that begin with one of the prefixes, in order."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(prefixes)))


class UnknownParamError(TypeError):
    """A name among the transport_params that nobody reads."""


def check_params(uri: URI, params: Params, *, writing: bool = False) -> None:
    """Refuse transport_params that nobody reads: another store's, or with a typing error.

    Raises:
        UnknownParamError: there is such a name; the error tells the nearest of those that are read.
    """
    if uri.params is None:
        return
    known, given = (*uri.params, *uri.writer_params * writing, "timeout"), params or {}
    kind, verb = type(uri).__name__, "written" if writing else "read"
    where = f"when a {kind} is {verb}"
    _refuse_unknown("transport_params", given, known, where)
    for name, keys in uri.nested_params.items():
        _refuse_unknown(f"transport_params[{name!r}]", given.get(name) or {}, keys, where)


def _refuse_unknown(what: str, given: Iterable[str], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            meant = f"is it {near[0]!r}? " if near else ""
            raise UnknownParamError(
                f"{what}[{name!r}] means nothing {where}; {meant}what does: {', '.join(known)}"
            )


_OWN_PARAMS = {"timeout", "session", "user_project"}  # which smart-open's stores do not take


def connections_of(uri: URI, params: Params) -> int:
    """Give how many reads at once a place allows, or the caller, who may want fewer."""
    wanted = (params or {}).get("max_concurrency")
    return min(uri.connections, max(1, int(wanted))) if wanted else uri.connections


def timeout_of(params: Params) -> float:
    """Give the seconds of silence on a connection after which it counts as lost."""
    return float((params or {}).get("timeout") or TIMEOUT_SECONDS)


def with_client(params: Params, client: Any) -> dict[str, Any]:
    """Give what smart-open takes. A client has its own timeout."""
    return {k: v for k, v in (params or {}).items() if k not in _OWN_PARAMS} | {"client": client}


def imported(name: str, uri: URI, package: str | None = None) -> ModuleType:
    """Import a package where it is used.

    Args:
        name: the module's.
        uri: for whom.
        package: what to install, where that is no extra of ours.

    Raises:
        MissingPackageError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as err:
        package = package or (f"'anemoi-ckpt[{uri.extra}]'" if uri.extra else name)
        raise MissingPackageError(
            uri, f"the package {name} is not installed", f"pip install {package}"
        ) from err


# ── open ──────────────────────────────────────────────────────────────────────────────────────


@functools.singledispatch
def open_stream(uri: _Place, transport_params: Params = None) -> BinaryIO:  # noqa: ARG001 - for handlers
    """Open a place for reading, from its first byte on: the one handler a new place must have.

    Args:
        uri: the place. A text or a path is parsed first.
        transport_params: smart-open's: a dict with ``client``, ``session``, ``headers``, ….

    Raises:
        CheckpointError: not found, no access, no answer, or no handler for this kind of place.
    """
    raise InvalidURIError(
        uri, f"no handler opens a {type(uri).__name__}", "write one with @open_stream.register"
    )


@open_stream.register
def open_text(uri: str | os.PathLike, transport_params: Params = None) -> BinaryIO:  # type: ignore[type-arg] # singledispatch takes no parameters of types
    """Parse a text, and open the place that it names."""
    return open_stream(parse_uri(uri), transport_params)


# ── range ─────────────────────────────────────────────────────────────────────────────────────


@frozen
class Version:
    """Which object a read came from: its size in bytes, and its ETag, generation or the like."""

    size: int
    tag: str | None = None
    digests: Mapping[str, bytes] = field(factory=dict, eq=False, repr=False)  # as far as it tells
    name: str | None = field(default=None, eq=False)  # what a copy is to be called, if it tells
    codings: str = field(default="", eq=False)  # content codings that it is stored in, with commas

    @property
    def is_weak(self) -> bool:
        """Whether two objects with this tag may differ in some bytes (RFC 9110 8.8.1)."""
        return self.tag is None or self.tag.startswith("W/")


class Buffers:
    """Writable buffers, filled one after the other as if they were one (as `os.preadv` does).

    They know how much is filled, so a read that broke off goes on with the first missing byte.

    >>> import io
    >>> first, second = bytearray(2), bytearray(3)
    >>> Buffers(first, second).readfrom(io.BytesIO(b"hello"))
    >>> first, second
    (bytearray(b'he'), bytearray(b'llo'))
    """

    def __init__(self, *buffers: Any, notify: Notify | None = None) -> None:
        """Take buffers of bytes; `notify` is told how many bytes came, each time some did."""
        views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        self._begin(iter(views), sum(map(len, views)), notify)

    @classmethod
    def lazily(
        cls, buffers: Iterable[memoryview], size: int, notify: Notify | None = None
    ) -> Buffers:
        """Take buffers of `size` bytes in all from an iterator that makes them.

        Each is full when the next one is asked for, so a file can be written through one buffer.
        """
        made = cls()
        made._begin(iter(buffers), size, notify)
        return made

    def _begin(self, views: Iterator[memoryview], size: int, notify: Notify | None) -> None:
        self._views, self.size, self.filled, self._notify = views, size, 0, notify
        self._rest = next(views, memoryview(b""))

    def readfrom(self, stream: Any) -> None:
        """Fill from a stream with `readinto`, until the buffers are full or the stream ends."""
        while self._rest:
            count = stream.readinto(self._rest[:CHUNK_BYTES])
            if not count:
                return
            self._advance(count)

    def write(self, data: bytes | memoryview) -> int:
        """Take bytes that an SDK pushes. Bytes beyond the buffers' size are ignored."""
        view = memoryview(data)
        while self._rest and view:
            count = min(len(view), len(self._rest))
            self._rest[:count] = view[:count]
            self._advance(count)
            view = view[count:]
        return len(data)

    def _advance(self, count: int) -> None:
        self._rest = self._rest[count:] or next(self._views, memoryview(b""))
        self.filled += count
        if self._notify:
            self._notify(count)


class UnrangedError(Exception):
    """The place cannot give a part of an object: take it whole."""

    def __init__(self, name: str | None = None) -> None:
        """Take what a copy is to be called, if the place tells."""
        super().__init__(name)
        self.name = name


class NoSuffixError(UnrangedError):
    """The place cannot give the end of an object of a size that is not known: ask by offset."""


# How servers answer that ask for no range from the end, though they give others: with an error of
# the client's or the server's, or as if the range were 0-N.
SUFFIX_REFUSED = frozenset({400, 405, 416, 500, 501})
LONGEST_NAME = 255  # bytes of a file's name, on the file systems of today


@functools.singledispatch
def read_range(
    uri: URI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Fill buffers with an object's bytes from `offset` on, and tell which object it was.

    The default seeks in `open_stream`; each store has its own ranged GET.

    Args:
        uri: the place.
        offset: the first byte; from the end if negative, and then the buffers' size.
        buffers: what to fill. A body that ends early leaves them partly filled.
        pin: what the first read told: the object must still be that one.
        transport_params: as for `open_stream`.

    Raises:
        CheckpointError: as `open_stream`; ChangedError if the object is not the pinned one.
        UnrangedError: the place cannot give a part of an object.
        NoSuffixError: the place cannot give a part from the end.
    """
    from _anemoi_ckpt.places.explained import explained  # noqa: PLC0415 - it stands on this module

    with explained(uri), closing(open_stream(uri, transport_params)) as stream:
        if not stream.seekable():
            raise UnrangedError
        stream.seek(0, os.SEEK_END)
        size = stream.tell()  # paramiko's seek returns None
        version = pinned(uri, Version(size), pin)
        stream.seek(max(0, size + offset) if offset < 0 else min(offset, size))
        buffers.readfrom(stream)
        return version


def pinned(uri: URI, version: Version, pin: Version | None) -> Version:
    """Give a version back, if it is the pinned one.

    Raises:
        ChangedError: it is another.
        UnrangedError: nobody knows, because a tag is weak: the servers behind a load balancer give
            weak tags of their own to one object. What comes in one answer belongs together.
    """
    if pin is None or version == pin:
        return version
    if version.size == pin.size and (version.is_weak or pin.is_weak):
        raise UnrangedError
    raise ChangedError(
        uri,
        f"the object was replaced while it was read ({pin.tag or pin.size} is now "
        f"{version.tag or version.size})",
        uri.when_changed,
    )


# ── version ───────────────────────────────────────────────────────────────────────────────────


@functools.singledispatch
def read_version(uri: URI, transport_params: Params = None) -> Version:
    """Tell which object a place has now, and its digests where the place keeps them.

    The default asks for the first byte; stores are asked for the object's properties.

    Args:
        uri: the place.
        transport_params: as for `open_stream`.

    Raises:
        CheckpointError: as `open_stream`.
    """
    return read_range(uri, 0, Buffers(bytearray(1)), None, transport_params)


# ── list ──────────────────────────────────────────────────────────────────────────────────────


@frozen
class Entry:
    """What a listing tells of an object, or of a folder: then its path ends with a slash."""

    uri: URI
    size: int | None = None
    """In bytes; None of a folder."""
    modified: datetime | None = None
    """When it was last written to, in UTC; None of a folder."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder: more lies beneath it."""
        path = path_of(self.uri)
        return not path or path.endswith("/")  # a bucket's is empty

    @classmethod
    def beneath(
        cls, uri: URI, path: str, size: int | None = None, modified: datetime | None = None
    ) -> Entry:
        """Make an entry of a path that was found when `uri` was listed."""
        listed = path_of(uri)
        return cls(sibling(uri, path[listed.rfind("/") + 1 :]), size, modified)


def _in_order(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: path_of(entry.uri))


@frozen
class Page:
    """A part of a listing, in the order of the paths."""

    entries: list[Entry] = field(converter=_in_order)
    token: str | None = None
    """What to ask for the next part with; None after the last."""


@functools.singledispatch
def list_page(
    uri: _Place,
    token: str | None = None,  # noqa: ARG001 - for handlers
    transport_params: Params = None,  # noqa: ARG001 - likewise
    *,
    recursive: bool = False,  # noqa: ARG001 - likewise
) -> Page:
    """List the objects whose paths begin with that of `uri`, in the order of their paths.

    Args:
        uri: a beginning of paths. A folder's ends with a slash.
        token: of the page before, or None for the first.
        transport_params: as for `open_stream`.
        recursive: whether to list what lies in folders beneath it, not the folders.

    Raises:
        CheckpointError: as `open_stream`; InvalidURIError where this kind of place lists nothing.
    """
    raise InvalidURIError(
        uri,
        f"a {type(uri).__name__} does not tell what is in it",
        "name the file, or add @list_page.register",
    )


@list_page.register
def list_text_page(
    uri: str | os.PathLike,  # type: ignore[type-arg] # as for open_stream
    token: str | None = None,
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List the folder that a text names."""
    return list_page(parse_folder(uri), token, transport_params, recursive=recursive)


def all_pages(ask: Callable[[str | None], Page]) -> Iterator[Entry]:
    """Give the entries of all pages, each asked for, by its token, as it is reached."""
    token: str | None = None
    while True:
        page = ask(token)
        yield from page.entries
        token = page.token
        if token is None:
            return


def list_all(uri: URI, transport_params: Params = None) -> Iterator[Entry]:
    """List all pages.

    Raises:
        CheckpointError: as `list_page`.
    """
    return all_pages(lambda token: list_page(uri, token, transport_params))


# ── write ─────────────────────────────────────────────────────────────────────────────────────


@functools.singledispatch
def open_writer(uri: _Place, transport_params: Params = None) -> Writer:  # noqa: ARG001 - for handlers
    """Open a place for writing, all or nothing.

    Gives a context manager. The object appears when its block ends well; if that raises, nothing
    is left of it, and what was there before stays.

    Args:
        uri: the place. A text or a path is parsed first.
        transport_params: as for `open_stream`.

    Raises:
        CheckpointError: no access, no answer, or nothing can be written to this kind of place.
    """
    raise InvalidURIError(
        uri,
        f"a {type(uri).__name__} cannot be written to",
        "write to a path, s3://, gs://, az://, sftp://, ftp://, hdfs:// or webhdfs://, or add "
        "@open_writer.register",
    )


@open_writer.register
def open_text_writer(uri: str | os.PathLike, transport_params: Params = None) -> Writer:  # type: ignore[type-arg] # as for open_stream
    """Parse a text, and open the place that it names for writing."""
    return open_writer(parse_uri(uri), transport_params)


# ── remove ────────────────────────────────────────────────────────────────────────────────────


@functools.singledispatch
def remove_object(uri: _Place, transport_params: Params = None) -> None:  # noqa: ARG001 - for handlers
    """Remove an object. Where there is none, nothing happens.

    Args:
        uri: the place.
        transport_params: as for `open_stream`.

    Raises:
        CheckpointError: no access, no answer, or nothing can be removed from this kind of place.
    """
    raise InvalidURIError(
        uri,
        f"nothing can be removed from a {type(uri).__name__}",
        "remove it by other means, or add @remove_object.register",
    )


@remove_object.register
def remove_text(uri: str | os.PathLike, transport_params: Params = None) -> None:  # type: ignore[type-arg] # as for open_stream
    """Parse a text, and remove the object that it names."""
    remove_object(parse_uri(uri), transport_params)
