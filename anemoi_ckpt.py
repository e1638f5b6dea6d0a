"""Load a PyTorch checkpoint from anywhere, moving only the bytes that are used.

Read from top to bottom, this file is the way a checkpoint takes::

    text ──parse_uri──▶ URI ──open_stream, read_range──▶ bytes
    first + last block ──▶ archive ──▶ hollow checkpoint (every tensor on the meta device)
    hollow ──strategies──▶ the records that the result still needs
    records ──ranges, in parallel, CRC-checked──▶ tensors ──strategies──▶ result

places · streams · ranges · sources · fetch · load · keep · install
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import gc
import http.client
import importlib
import io
import itertools
import logging
import os
import random
import re
import sys
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, ClassVar

import torch
from attrs import field, frozen
from torch.utils._pytree import tree_leaves

from _ckpt_archive import (
    LOCAL_SIGNATURE,
    Archive,
    Ledger,
    Record,
    asks_for_values,
    build,
    check,
    crc_matches,
    data_start,
    is_packed,
    read_archive,
    read_directory,
    unpacked,
)
from _ckpt_errors import (
    AccessDeniedError,
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptError,
    InvalidURIError,
    MismatchError,
    MissingPackageError,
    NotACheckpointError,
    UnreachableError,
    UnsafeCheckpointError,
    redact,
)
from _ckpt_install import Before, Match, Report, check_enough, install, look, match

__all__ = [
    "GCSURI",
    "HTTPURI",
    "S3URI",
    "URI",
    "AccessDeniedError",
    "AzureURI",
    "Buffers",
    "ChangedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptError",
    "InvalidURIError",
    "LocalURI",
    "MismatchError",
    "MissingPackageError",
    "NotACheckpointError",
    "UnreachableError",
    "UnsafeCheckpointError",
    "Version",
    "download",
    "load",
    "load_into",
    "open_stream",
    "parse_uri",
    "read_range",
    "register_scheme",
]

log = logging.getLogger("anemoi_ckpt")

Params = Mapping[str, Any] | None  # smart-open's transport_params
Strategy = Callable[[Any], Any]
Notify = Callable[[int], object]  # told how many bytes have come, each time some have
Progress = bool | Callable[[int, int | None], object] | None

BLOCK_BYTES = 64 * 1024  # first and last block: holds pickle and directory of most checkpoints
PART_BYTES = 8 * 1024**2  # least for a request: long against a round trip
LONG_PART_BYTES = 64 * 1024**2  # most: so that connections end together
CONNECTIONS = 32  # at once: stores cap each connection (80 MB/s or so), not the sum
CHUNK_BYTES = 1024**2  # one readinto: how often progress and interrupts are looked at
GAP_BYTES = 512 * 1024  # most that all gaps bridged between wanted records may cost a load
ATTEMPTS = 5  # without progress, before a place counts as unreachable
TIMEOUT_SECONDS = 60.0  # of silence on a connection
PROGRESS_DELAY_SECONDS = 1.0  # a shorter load shows no bar


# ── places ────────────────────────────────────────────────────────────────────────────────────


@frozen
class URI:
    """A place, as the user wrote it. Each kind of place is a frozen subclass.

    ``str(uri)`` is the text it was parsed from, secrets and all; ``repr(uri)`` hides them.
    """

    text: str = field(repr=lambda text: repr(redact(text)))

    connections: ClassVar[int] = CONNECTIONS
    extra: ClassVar[str | None] = None  # which `pip install 'anemoi-ckpt[extra]'` it needs
    credentials: ClassVar[str] = "check your permissions"  # what to do when access is denied

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return _last_part(self.text)

    def __str__(self) -> str:
        """Give back the text as it was written."""
        return self.text


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


@frozen
class LocalURI(URI):
    """A file on a disk: a plain or relative path, ``~``, ``pathlib.Path``, or ``file://``."""

    path: str

    connections: ClassVar[int] = min(4, os.cpu_count() or 1)  # threads that copy
    credentials: ClassVar[str] = "make the file readable for the user who runs this"

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return _last_part(self.path)


@frozen
class HTTPURI(URI):
    """A URL, as RFC 9110 has it; its query (a signature, say) is kept as it is."""

    extra: ClassVar[str | None] = "http"
    credentials: ClassVar[str] = (
        "give credentials in ~/.netrc, in the URL, or as transport_params={'headers': …}; "
        "ask for a new one if the URL is a signed one that has expired"
    )

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return _last_part(urllib.parse.unquote(urllib.parse.urlsplit(self.text).path))


@frozen
class S3URI(URI):
    """An object in S3 or a store that speaks S3: ``s3://bucket/key[?versionId=…]``."""

    bucket: str
    key: str
    version_id: str | None = None

    extra: ClassVar[str | None] = "s3"
    credentials: ClassVar[str] = (
        "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL "
        "for a store that is not Amazon's), or give transport_params={'client': …}"
    )

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return _last_part(self.key)


@frozen
class GCSURI(URI):
    """An object in Google Cloud Storage: ``gs://bucket/name[#generation]``."""

    bucket: str
    name: str
    generation: int | None = None

    extra: ClassVar[str | None] = "gcs"
    credentials: ClassVar[str] = (
        "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, "
        "or give transport_params={'client': …}"
    )

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return _last_part(self.name)


@frozen
class AzureURI(URI):
    """A blob in Azure: ``az://container/blob``, ``abfss://…``, or its ``https://`` address."""

    container: str
    blob: str
    account_url: str | None = None
    sas: str | None = field(default=None, repr=False)

    extra: ClassVar[str | None] = "azure"
    credentials: ClassVar[str] = (
        "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or "
        "AZURE_STORAGE_SAS_TOKEN, or install azure-identity and run `az login`"
    )

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return _last_part(self.blob)


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_AZURE_HOST = re.compile(  # Microsoft's own clouds: others get no credentials of the environment
    r"[\w-]+\.(?:blob|dfs)\.core\.(?:windows\.net|chinacloudapi\.cn|usgovcloudapi\.net)", re.ASCII
)


def parse_uri(place: str | os.PathLike[str] | URI) -> URI:
    """Tell what kind of place a text names.

    Args:
        place: a path, a URL, or a URI that was parsed before.

    Raises:
        InvalidURIError: an unknown scheme, an empty bucket or key, or a folder.

    >>> parse_uri("s3://bucket/run/last.ckpt").key
    'run/last.ckpt'
    >>> parse_uri("last.ckpt")
    LocalURI(text='last.ckpt', path='last.ckpt')
    """
    if isinstance(place, URI):
        return place
    text = os.fspath(place)
    match = _SCHEME.fullmatch(text) if isinstance(place, str) else None
    if match is None:
        return _parse_local(text)
    parser = _PARSERS.get(match[1].lower())
    if parser is None:
        known = ", ".join(f"{scheme}://" for scheme in _PARSERS)
        raise InvalidURIError(
            text,
            f"the scheme {match[1]}:// is unknown (known: {known}, and plain paths)",
            f"add it with register_scheme({match[1]!r}, parser) and one @open_stream.register",
        )
    try:
        return parser(text)
    except CheckpointError:
        raise
    except ValueError as err:  # such as an IPv6 address that does not end
        raise InvalidURIError(text, f"no URL ({err})", "check it for typing errors") from None


def register_scheme(scheme: str, parser: Callable[[str], URI]) -> None:
    """Teach `parse_uri` a new scheme (or replace a known one).

    Args:
        scheme: what stands before ``://``, such as ``"sftp"``.
        parser: text to URI. A subclass of `URI` with no fields of its own is one.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
        raise ValueError(f"{scheme!r} is no scheme: two or more of letters, digits, '+', '.', '-'")
    _PARSERS[scheme.lower()] = parser


def _parse_local(text: str) -> URI:
    if not text:
        raise InvalidURIError("''", "the path is empty", "give the path or URL of a checkpoint")
    return LocalURI(text, os.path.expanduser(text))  # noqa: PTH111 - keeps ./ and // as written


def _parse_file(text: str) -> URI:
    url = urllib.parse.urlsplit(text)
    if url.netloc not in ("", "localhost") or not url.path:
        raise InvalidURIError(text, "names no file on this machine", "write file:///path/to/file")
    return LocalURI(text, urllib.parse.unquote(text.split("://", 1)[1][len(url.netloc) :]))


def _parse_http(text: str) -> URI:
    url = urllib.parse.urlsplit(text)
    if not url.hostname:
        raise InvalidURIError(text, "the URL has no host", "write https://host/path")
    if _AZURE_HOST.fullmatch(url.netloc):
        container, blob = _bucket_and_key(text, urllib.parse.unquote(url.path.lstrip("/")))
        account = f"https://{url.netloc.replace('.dfs.', '.blob.')}"
        return AzureURI(text, container, blob, account, url.query or None)
    return HTTPURI(text)


def _parse_s3(text: str) -> URI:
    rest, _, version = text.split("://", 1)[1].partition("?versionId=")
    if "@" in rest.partition("/")[0]:
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        raise InvalidURIError(text, "has credentials in it", remedy)
    return S3URI(text, *_bucket_and_key(text, rest), version or None)


def _parse_gcs(text: str) -> URI:
    path, generation = re.fullmatch(r"\w+://(.*?)(?:#(\d+))?", text, re.DOTALL).groups()  # type: ignore[union-attr] # every text matches
    return GCSURI(text, *_bucket_and_key(text, path), int(generation) if generation else None)


def _parse_azure(text: str) -> URI:
    authority, slash, path = text.split("://", 1)[1].partition("/")
    container, at, host = authority.partition("@")
    account = f"https://{host.replace('.dfs.', '.blob.')}" if at else None
    return AzureURI(text, *_bucket_and_key(text, container + slash + path), account)


def _bucket_and_key(text: str, path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    if not bucket or not key:
        missing = "object" if bucket else "bucket"
        raise InvalidURIError(text, f"names no {missing}", "write scheme://bucket/path/to/file")
    if key.endswith("/"):
        raise InvalidURIError(text, "names a folder", "add the name of the checkpoint in it")
    return bucket, key


_PARSERS: dict[str, Callable[[str], URI]] = {
    "file": _parse_file,
    "http": _parse_http,
    "https": _parse_http,
    "s3": _parse_s3,
    "gs": _parse_gcs,
    "gcs": _parse_gcs,
    "az": _parse_azure,
    "azure": _parse_azure,
    "abfs": _parse_azure,
    "abfss": _parse_azure,
    "wasb": _parse_azure,
    "wasbs": _parse_azure,
}


# ── streams ───────────────────────────────────────────────────────────────────────────────────


@functools.singledispatch
def open_stream(uri: URI, transport_params: Params = None) -> BinaryIO:  # noqa: ARG001 - for handlers
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
def _(uri: str | os.PathLike, transport_params: Params = None) -> BinaryIO:  # type: ignore[misc, type-arg] # wider than URI, and singledispatch takes no parameters
    return open_stream(parse_uri(uri), transport_params)


@open_stream.register
def _(uri: LocalURI, transport_params: Params = None) -> BinaryIO:  # noqa: ARG001 - a file needs none
    with _explained(uri):
        return open(uri.path, "rb", buffering=0)  # noqa: PTH123 - the caller's to close


@open_stream.register
def _(uri: HTTPURI, transport_params: Params = None) -> BinaryIO:
    with _explained(uri):
        reader = _package("smart_open.http", uri)
        params = {
            "session": _http_session(uri),
            "timeout": TIMEOUT_SECONDS,
            **(transport_params or {}),
        }
        stream = reader.open(uri.text, "rb", **params)
        stream.response.raw.decode_content = True  # some servers compress though nobody asked
        return stream  # type: ignore[no-any-return]


@open_stream.register
def _(uri: S3URI, transport_params: Params = None) -> BinaryIO:
    with _explained(uri):
        params = {**(transport_params or {}), "client": _s3_client(uri, transport_params)}
        s3 = _package("smart_open.s3", uri)
        return s3.open(uri.bucket, uri.key, "rb", uri.version_id, **params)  # type: ignore[no-any-return]


@open_stream.register
def _(uri: GCSURI, transport_params: Params = None) -> BinaryIO:
    with _explained(uri):
        params = {**(transport_params or {}), "client": _gcs_client(uri, transport_params)}
        params.setdefault("get_blob_kwargs", {"generation": uri.generation})
        return _package("smart_open.gcs", uri).open(uri.bucket, uri.name, "rb", **params)  # type: ignore[no-any-return]


@open_stream.register
def _(uri: AzureURI, transport_params: Params = None) -> BinaryIO:
    with _explained(uri):
        params = {**(transport_params or {}), "client": _azure_client(uri, transport_params)}
        azure = _package("smart_open.azure", uri)
        return azure.open(uri.container, uri.blob, "rb", **params)  # type: ignore[no-any-return]


def _package(name: str, uri: URI) -> ModuleType:
    """Import a package where it is used, or say what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as err:
        needed = f"'anemoi-ckpt[{uri.extra}]'" if uri.extra else name
        raise MissingPackageError(
            uri, f"the package {name} is not installed", f"pip install {needed}"
        ) from err


# Clients are made once and reused: one for each process (sockets do not survive a fork) and for
# each setting of the environment that the store's own chain of credentials reads.


def _http_session(uri: URI) -> Any:
    return _make_http_session(_package("requests", uri), os.getpid())


@functools.lru_cache(maxsize=1)
def _make_http_session(requests: ModuleType, _pid: int) -> Any:
    session = requests.Session()
    adapter = requests.adapters.HTTPAdapter(CONNECTIONS, CONNECTIONS, max_retries=0)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _environment(*prefixes: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(prefixes)))


def _s3_client(uri: S3URI, params: Params) -> Any:
    given = (params or {}).get("client")
    return given or _make_s3_client(_package("boto3", uri), _environment("AWS_"), os.getpid())


@functools.lru_cache(maxsize=8)
def _make_s3_client(boto3: ModuleType, _environment: object, _pid: int) -> Any:
    import botocore  # noqa: PLC0415 - comes with boto3
    import botocore.config  # noqa: PLC0415

    session = boto3.Session()
    public = session.get_credentials() is None  # then only a public bucket will answer
    return session.client(
        "s3",
        # boto3 asks for a region even where a store has none
        region_name=session.region_name or "us-east-1",
        config=botocore.config.Config(
            max_pool_connections=CONNECTIONS,
            connect_timeout=TIMEOUT_SECONDS,
            read_timeout=TIMEOUT_SECONDS,
            retries={"total_max_attempts": 1},  # one policy of retries for all places: ours
            signature_version=botocore.UNSIGNED if public else None,
        ),
    )


def _gcs_client(uri: GCSURI, params: Params) -> Any:
    given = (params or {}).get("client")
    if given:
        return given
    storage = _package("google.cloud.storage", uri)
    return _make_gcs_client(storage, _environment("GOOGLE_", "STORAGE_", "GCLOUD_"), os.getpid())


@functools.lru_cache(maxsize=8)
def _make_gcs_client(storage: ModuleType, _environment: object, _pid: int) -> Any:
    import google.auth.exceptions  # noqa: PLC0415 - comes with google-cloud-storage

    try:
        return storage.Client()
    except google.auth.exceptions.DefaultCredentialsError:
        return storage.Client.create_anonymous_client()  # only a public bucket will answer


def _azure_client(uri: AzureURI, params: Params) -> Any:
    given = (params or {}).get("client")
    if given:
        return given
    blob = _package("azure.storage.blob", uri)
    return _make_azure_client(blob, uri, _environment("AZURE_"), os.getpid())


@functools.lru_cache(maxsize=8)
def _make_azure_client(
    package: ModuleType, uri: AzureURI, environment: tuple[tuple[str, str], ...], _pid: int
) -> Any:
    settings = dict(environment)
    options = {
        "max_single_get_size": LONG_PART_BYTES,
        "max_chunk_get_size": LONG_PART_BYTES,
        "connection_timeout": TIMEOUT_SECONDS,
        "read_timeout": TIMEOUT_SECONDS,
        "retry_total": 0,  # one policy of retries for all places: ours
    }
    connection = settings.get("AZURE_STORAGE_CONNECTION_STRING")
    account = settings.get("AZURE_STORAGE_ACCOUNT") or settings.get("AZURE_STORAGE_ACCOUNT_NAME")
    name = uri.account_url and uri.account_url.split("://")[1].split(".")[0]
    if connection and (not name or f"AccountName={name};" in f"{connection};"):
        return package.BlobServiceClient.from_connection_string(connection, **options)
    if not (uri.account_url or account):
        raise AccessDeniedError(uri, "no storage account is named", uri.credentials)
    url = uri.account_url or f"https://{account}.blob.core.windows.net"
    # credentials of the environment belong to the environment's account, and to no other
    known = _AZURE_HOST.fullmatch(url.removeprefix("https://")) is not None
    own = known and account and url.startswith(f"https://{account}.")
    key = settings.get("AZURE_STORAGE_KEY") or settings.get("AZURE_STORAGE_ACCOUNT_KEY")
    credential = uri.sas or (own and (key or settings.get("AZURE_STORAGE_SAS_TOKEN"))) or None
    if known and not credential:
        credential = _azure_identity()
    return package.BlobServiceClient(url, credential, **options)


def _azure_identity() -> Any:
    try:
        return importlib.import_module("azure.identity").DefaultAzureCredential()
    except ImportError:
        return None  # then only a public container will answer


# ── ranges ────────────────────────────────────────────────────────────────────────────────────


@frozen
class Version:
    """Which object a read came from: its size in bytes, and its ETag, generation or the like."""

    size: int
    tag: str | None = None


class Buffers:
    """Writable buffers, filled one after the other as if they were one (as `os.preadv` does).

    Knows how far it is, so that a read that broke off goes on with the first byte it missed.

    >>> first, second = bytearray(2), bytearray(3)
    >>> Buffers(first, second).readfrom(io.BytesIO(b"hello"))
    >>> first, second
    (bytearray(b'he'), bytearray(b'llo'))
    """

    def __init__(self, *buffers: Any, notify: Notify | None = None) -> None:
        """Take buffers of bytes; `notify` is told how many bytes came, each time some did."""
        self._rest = [memoryview(buffer).cast("B") for buffer in reversed(buffers) if len(buffer)]
        self._notify = notify
        self.size = sum(map(len, self._rest))
        self.filled = 0

    def readfrom(self, stream: Any) -> None:
        """Fill from a stream with `readinto`, until full or the stream ends."""
        while self._rest:
            count = stream.readinto(self._rest[-1][:CHUNK_BYTES])
            if not count:
                return
            self._advance(count)

    def write(self, data: bytes | memoryview) -> int:
        """Take bytes that an SDK pushes; what is more than the buffers hold is left."""
        view = memoryview(data)
        while self._rest and view:
            count = min(len(view), len(self._rest[-1]))
            self._rest[-1][:count] = view[:count]
            self._advance(count)
            view = view[count:]
        return len(data)

    def _advance(self, count: int) -> None:
        self._rest[-1] = self._rest[-1][count:]
        if not self._rest[-1]:
            self._rest.pop()
        self.filled += count
        if self._notify:
            self._notify(count)


class _UnrangedError(Exception):
    """The place cannot give a part of an object: take it whole."""


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
    """
    with _explained(uri), closing(open_stream(uri, transport_params)) as stream:
        if not stream.seekable():
            raise _UnrangedError
        stream.seek(0, os.SEEK_END)
        size = stream.tell()  # paramiko's seek tells nothing
        version = _pinned(uri, Version(size), pin)
        stream.seek(max(0, size + offset) if offset < 0 else min(offset, size))
        buffers.readfrom(stream)
        return version


@read_range.register
def _(
    uri: LocalURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    with open_stream(uri, transport_params) as stream, _explained(uri):
        status = os.fstat(stream.fileno())
        version = Version(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}")
        _pinned(uri, version, pin)
        stream.seek(max(0, version.size + offset) if offset < 0 else offset)
        buffers.readfrom(stream)
    return version


@read_range.register
def _(
    uri: HTTPURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    params = transport_params or {}
    headers = {
        "Accept-Encoding": "identity",  # ranges count the bytes that are stored
        **(params.get("headers") or {}),
        "Range": _range(offset, buffers),
    }
    if pin and pin.tag and pin.tag.startswith('"'):  # RFC 9110 13.1.1: strong ETags alone
        headers["If-Match"] = pin.tag
    options: dict[str, Any] = {"headers": headers, "stream": True, "cert": params.get("cert")}
    options["timeout"] = params.get("timeout") or TIMEOUT_SECONDS
    if "authorization" in map(str.lower, headers):
        options["auth"] = _as_it_is  # else ~/.netrc would win
    if "user" in params:
        options["auth"] = (params["user"], params.get("password", ""))
    session = params.get("session") or _http_session(uri)
    with _explained(uri, pin), session.get(uri.text, **options) as reply:
        reply.raise_for_status()
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if reply.status_code != 206 or not extent or reply.headers.get("Content-Encoding"):  # noqa: PLR2004 - partial content
            raise _UnrangedError
        tag = reply.headers.get("ETag") or reply.headers.get("Last-Modified")
        version = _pinned(uri, Version(int(extent[2]), tag), pin)
        if offset >= 0 and int(extent[1]) != offset:
            raise _UnrangedError  # a range, but not the one that was asked for
        _read_socket(reply.raw, buffers)
    return version


@read_range.register
def _(
    uri: S3URI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    options = {"Bucket": uri.bucket, "Key": uri.key, "Range": _range(offset, buffers)}
    if pin and pin.tag:
        options["IfMatch"] = pin.tag
    if uri.version_id:
        options["VersionId"] = uri.version_id
    with _explained(uri, pin):
        reply = _s3_client(uri, transport_params).get_object(**options)
        with closing(reply["Body"]) as body:
            if "ContentRange" not in reply:  # some stores that speak S3 ignore Range
                raise _UnrangedError
            size = int(reply["ContentRange"].rpartition("/")[2])
            version = _pinned(uri, Version(size, reply["ETag"]), pin)
            _read_socket(getattr(body, "_raw_stream", body), buffers)
    return version


@read_range.register
def _(
    uri: GCSURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    with _explained(uri, pin):
        client = _gcs_client(uri, transport_params)
        blob = client.bucket(uri.bucket).blob(uri.name, generation=uri.generation)
        if pin is None:
            blob.reload(timeout=TIMEOUT_SECONDS, retry=None)
            pin = Version(blob.size, str(blob.generation))
        if pin.size:
            start = max(0, pin.size + offset) if offset < 0 else offset
            blob.download_to_file(
                buffers,
                start=start,
                end=min(start + buffers.size - buffers.filled, pin.size) - 1,
                raw_download=True,
                if_generation_match=int(pin.tag or 0),
                checksum=None,  # a range has none; the archive's CRCs are checked
                timeout=TIMEOUT_SECONDS,
                retry=None,
            )
    return pin


@read_range.register
def _(
    uri: AzureURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    conditions = _package("azure.core", uri).MatchConditions
    with _explained(uri, pin):
        blob = _azure_client(uri, transport_params).get_blob_client(uri.container, uri.blob)
        if offset < 0:  # Azure knows no suffix ranges
            known = blob.get_blob_properties()
            pin = _pinned(uri, Version(known.size, known.etag), pin)
            offset = max(0, pin.size + offset)
        match = {"etag": pin.tag, "match_condition": conditions.IfNotModified} if pin else {}
        length = buffers.size - buffers.filled
        reply = blob.download_blob(offset=offset, length=length, max_concurrency=1, **match)
        total = int(reply.properties.content_range.rpartition("/")[2])
        version = _pinned(uri, Version(total, reply.properties.etag), pin)
        reply.readinto(buffers)
    return version


def _as_it_is(request: Any) -> Any:
    """Authorize a request no further."""
    return request


def _read_socket(reply: Any, buffers: Buffers) -> None:
    """Fill buffers from the socket beneath urllib3's reply, which itself would copy each byte."""
    socket = getattr(reply, "_fp", None)
    if not isinstance(socket, http.client.HTTPResponse):
        buffers.readfrom(reply)
        return
    buffers.readfrom(socket)
    if socket.isclosed():  # at its end: the connection can be used again
        reply.release_conn()


def _range(offset: int, buffers: Buffers) -> str:
    """Write the value of a Range header (RFC 9110 14.1.2)."""
    length = buffers.size - buffers.filled
    return f"bytes=-{length}" if offset < 0 else f"bytes={offset}-{offset + length - 1}"


def _pinned(uri: URI, version: Version, pin: Version | None) -> Version:
    if pin is not None and version != pin:
        raise ChangedError(
            uri,
            f"the object was replaced while it was read ({pin.tag or pin.size} is now "
            f"{version.tag or version.size})",
            "load it again, once it is no longer written to",
        )
    return version


# What a store's own exception means. Every SDK's carries the HTTP status, under its own name.

_NO_CREDENTIALS = {
    "ClientAuthenticationError",
    "CredentialRetrievalError",
    "CredentialUnavailableError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_NETWORK = {"azure", "botocore", "google", "http", "requests", "socket", "ssl", "urllib3"}


@contextmanager
def _explained(uri: URI, pin: Version | None = None) -> Iterator[None]:
    """Turn whatever a store raises into a `CheckpointError` that it caused."""
    try:
        yield
    except (CheckpointError, _UnrangedError):
        raise
    except Exception as err:  # no SDK names all that it raises
        if isinstance(uri, LocalURI) and isinstance(err, OSError):
            raise _explain_local(uri, err) from err
        raise _explain(uri, err, pin) from _without_secrets(err)


def _explain(uri: URI, err: Exception, pin: Version | None) -> CheckpointError:
    status, code = _status(err)
    said = f"{type(err).__name__}: {err}" if not status else f"the server answered {status} {code}"
    denied = isinstance(err, PermissionError) or type(err).__name__ in _NO_CREDENTIALS
    if denied or status in (401, 403) or code in _EXPIRED:
        for make in (_make_s3_client, _make_gcs_client, _make_azure_client):
            make.cache_clear()  # the next call looks for credentials anew
        return AccessDeniedError(uri, f"access is denied ({said})", uri.credentials)
    if pin and status in (404, 410, 412, 416):
        return ChangedError(
            uri, f"the object was replaced or removed while it was read ({said})", "load it again"
        )
    if status in (404, 410) or isinstance(err, FileNotFoundError):
        return CheckpointNotFoundError(
            uri, f"there is no such object ({said})", "check the name for typing errors"
        )
    if status == 416:  # noqa: PLR2004 - no first byte: RFC 9110 15.5.17
        return _empty(uri)
    busy = status in (408, 429) or status >= 500  # noqa: PLR2004 - server errors
    package = type(err).__module__.partition(".")[0]
    if busy or (not status and (isinstance(err, OSError | EOFError) or package in _NETWORK)):
        remedy = "check the host, the endpoint and the network, or try again later"
        problem = UnreachableError(uri, f"no useful answer ({said})", remedy)
        problem.retry_after = _retry_after(err)
        return problem
    return CheckpointError(uri, said, "see the error above, which caused this one")


def _empty(uri: URI) -> CheckpointError:
    return NotACheckpointError(uri, "the file is empty", "was its upload or download complete?")


def _explain_local(uri: LocalURI, err: OSError) -> CheckpointError:
    path = Path(uri.path)
    if isinstance(err, IsADirectoryError):
        return InvalidURIError(uri, "this is a folder", "add the name of the checkpoint in it")
    if isinstance(err, PermissionError):
        return AccessDeniedError(uri, "the file may not be read", uri.credentials)
    if not isinstance(err, FileNotFoundError | NotADirectoryError):
        return CheckpointError(uri, f"{err.strerror or err}", "check the disk")
    if not path.parent.is_dir():
        return CheckpointNotFoundError(
            uri, f"the directory {path.parent} does not exist", "check the path"
        )
    names = [other.name for other in path.parent.iterdir()]
    similar = difflib.get_close_matches(path.name, names, n=3)
    remedy = f"is it one of these: {', '.join(similar)}?" if similar else "check the name"
    return CheckpointNotFoundError(uri, "there is no such file", remedy)


def _status(err: Any) -> tuple[int, str]:
    """Read the HTTP status and the store's own error code out of an SDK's exception."""
    reply = getattr(err, "response", None)
    if isinstance(reply, dict):  # botocore
        status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return int(status), str(reply.get("Error", {}).get("Code", ""))
    status = getattr(err, "status_code", None) or getattr(err, "code", None)  # azure, google
    status = status or getattr(reply, "status_code", None)  # requests
    code = getattr(err, "error_code", None) or getattr(reply, "reason", None) or ""
    return (int(status), str(code)) if isinstance(status, int) else (0, "")


def _retry_after(err: Any) -> float:
    """Read the seconds of a Retry-After header (RFC 9110 10.2.3)."""
    reply = getattr(err, "response", None)
    if isinstance(reply, dict):
        headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    else:
        headers = getattr(reply, "headers", None) or {}
    text = str(headers.get("retry-after") or headers.get("Retry-After") or "")
    return float(text) if text.isdecimal() else 0.0


def _without_secrets(err: BaseException) -> BaseException:
    """Give back the error, or a likeness of it if it or its causes show a secret."""
    link: BaseException | None = err
    while link is not None:
        if redact(str(link)) != str(link):
            return RuntimeError(f"{type(err).__name__}: {redact(str(err))}")
        link = link.__cause__ or link.__context__
    return err


# ── sources ───────────────────────────────────────────────────────────────────────────────────


@frozen
class _Source:
    """One object, pinned: where all bytes of a load come from, with one policy of retries."""

    uri: URI
    version: Version | None = None
    transport_params: Params = field(default=None, repr=False)
    moved: list[int] = field(factory=list, repr=False)  # bytes, by each read

    @property
    def size(self) -> int:
        """Give the object's size in bytes (0 before anything was read)."""
        return self.version.size if self.version else 0

    def read(self, offset: int, arrays: Sequence[Any], notify: Notify | None = None) -> Version:
        """Fill the arrays from an offset on; where a read breaks off, go on with what is missing.

        Raises:
            CheckpointError: as `read_range`, after `ATTEMPTS` in a row that brought nothing.
        """
        buffers = Buffers(*arrays, notify=notify)
        attempt, best = 0, 0
        while True:
            known = buffers.filled
            start = offset + known
            try:
                version = read_range(self.uri, start, buffers, self.version, self.transport_params)
            except UnreachableError as err:
                problem: UnreachableError = err
            else:
                first = max(0, version.size + offset) if offset < 0 else offset
                if buffers.filled >= min(buffers.size, version.size - first):
                    return version
                problem = UnreachableError(
                    self.uri,
                    f"the answer ended early, {buffers.filled} bytes after byte {first}",
                    "check the network and the server",
                )
            finally:
                self.moved.append(buffers.filled - known)
            attempt = 1 if buffers.filled > best else attempt + 1
            best = max(best, buffers.filled)
            _wait(attempt, problem)
            if self.version is None:  # what came may be another object's than what is to come
                buffers = Buffers(*arrays, notify=notify)


@frozen
class _HeldURI(URI):
    """A place in memory: an object that had to be taken whole."""

    data: memoryview = field(repr=False, eq=False)


@read_range.register
def _(
    uri: _HeldURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,  # noqa: ARG001 - memory does not change
    transport_params: Params = None,  # noqa: ARG001
) -> Version:
    size = len(uri.data)
    buffers.write(uri.data[max(0, size + offset) if offset < 0 else offset :])
    return Version(size)


class _Blocks(io.RawIOBase):
    """A seekable file over a source that keeps what it has read, and asks for the rest."""

    def __init__(self, source: _Source, blocks: dict[int, memoryview]) -> None:
        self._source, self._blocks, self._position = source, blocks, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}
        self._position = max(0, base[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._source.size - self._position))
        filled = 0
        while filled < wanted:
            block = self._block(self._position, wanted - filled)[: wanted - filled]
            view[filled : filled + len(block)] = block
            filled += len(block)
            self._position += len(block)
        return filled

    def _block(self, position: int, length: int) -> memoryview:
        """Give what is known from a position on; if nothing is, fetch all up to what is."""
        for start, block in self._blocks.items():
            if start <= position < start + len(block):
                return block[position - start :]
        end = min(start for start in (*self._blocks, self._source.size) if start > position)
        block = memoryview(bytearray(min(end - position, max(length, BLOCK_BYTES))))
        self._source.read(position, [block])
        self._blocks[position] = block
        return block


def _open_source(uri: URI, transport_params: Params) -> tuple[_Source, _Blocks]:
    """Ask for the first and the last block at once; they tell size and version, too."""
    unpinned = _Source(uri, None, transport_params)
    head, tail = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
    with ThreadPoolExecutor(2) as pool:
        last = pool.submit(unpinned.read, -BLOCK_BYTES, [tail])
        version = unpinned.read(0, [head])
        if version.size > BLOCK_BYTES:  # else the first block is all there is
            _pinned(uri, last.result(), version)
    if not version.size:
        raise _empty(uri)
    source = _Source(uri, version, transport_params, unpinned.moved)
    blocks = {0: memoryview(head)[: version.size]}
    if version.size > BLOCK_BYTES:
        blocks[version.size - BLOCK_BYTES] = memoryview(tail)
    return source, _Blocks(source, blocks)


def _hold(uri: URI, data: bytes | bytearray) -> tuple[_Source, _Blocks]:
    """Make a source of bytes in memory."""
    if not data:
        raise _empty(uri)
    view = memoryview(data)
    source = _Source(_HeldURI(uri.text, view), Version(len(view)))
    return source, _Blocks(source, {0: view})


def _stream_whole(uri: URI, transport_params: Params, notify: Notify) -> bytearray:
    """Take all of an object that comes in no parts."""
    attempt = 0
    while True:
        data = bytearray()
        try:
            with _explained(uri), closing(open_stream(uri, transport_params)) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    data += chunk
                    notify(len(chunk))
        except UnreachableError as err:
            attempt += 1
            _wait(attempt, err)
        else:
            return data


def _wait(attempt: int, problem: UnreachableError) -> None:
    """Wait before the next attempt: twice as long each time, or as long as the server asks for."""
    if attempt >= ATTEMPTS:
        problem.add_note(f"after {ATTEMPTS} attempts that brought nothing")
        raise problem
    log.info("attempt %d of %d failed: %s", attempt, ATTEMPTS, problem)
    jitter = random.uniform(0.05, 0.1)  # noqa: S311 - so that ranks do not return all at once
    time.sleep(max(min(problem.retry_after, TIMEOUT_SECONDS), jitter * 2**attempt))


def _read_whole(source: _Source, progress: Progress) -> bytearray:
    """Take all of an object, in parallel parts."""
    data = bytearray(source.size)
    with _shown(source.uri, source.size, progress) as notify:
        _in_parallel(
            [
                functools.partial(source.read, offset, [view for view, _ in pieces], notify)
                for offset, pieces in _cut(
                    0, [(memoryview(data), "")], _part_bytes(source, source.size)
                )
            ],
            source.uri.connections,
        )
    return data


@contextmanager
def _shown(uri: URI, total: int | None, progress: Progress) -> Iterator[Notify]:
    """Show how many of the bytes have come; the total is None where the place does not tell it."""
    lock = threading.Lock()
    if callable(progress):
        done = 0

        def count(size: int) -> None:
            nonlocal done
            with lock:
                done = min(done + size, total or sys.maxsize)  # headers come, too
                progress(done, total)

        yield count
    elif progress or (progress is None and (sys.stderr.isatty() or "ipykernel" in sys.modules)):
        from tqdm.auto import tqdm  # noqa: PLC0415 - only where it is shown

        delay = PROGRESS_DELAY_SECONDS if progress is None else 0
        with tqdm(total=total, desc=uri.filename, delay=delay, unit="B", unit_scale=True) as bar:

            def advance(size: int) -> None:
                with lock:
                    bar.update(min(size, (total or sys.maxsize) - bar.n))

            yield advance
    else:
        yield _ignore


def _ignore(_size: int) -> None:
    """Show nothing."""


_Pieces = list[tuple[memoryview, str]]  # memory to fill, and whose it is


def _part_bytes(source: _Source, total: int) -> int:
    """Choose how much to ask for at once: each connection a part, as far as that makes sense."""
    return min(max(total // source.uri.connections, PART_BYTES), LONG_PART_BYTES)


def _cut(offset: int, pieces: _Pieces, size: int) -> Iterator[tuple[int, _Pieces]]:
    """Cut a span of an object, which fills pieces of memory, into parts of one request each."""
    part: _Pieces = []
    room = size
    for view, owner in pieces:
        rest = view
        while rest:
            part.append((rest[:room], owner))
            rest, room = rest[room:], room - min(room, len(rest))
            if not room:
                yield offset, part
                offset, part, room = offset + size, [], size
    if part:
        yield offset, part


def _in_parallel(tasks: Sequence[Callable[[], Any]], connections: int) -> None:
    """Run all; the first failure or interrupt is raised at once, and drops what is not begun."""
    if len(tasks) == 1:
        tasks[0]()
        return
    pool = ThreadPoolExecutor(connections, "anemoi-ckpt")
    try:
        for future in as_completed([pool.submit(task) for task in tasks]):
            future.result()
    finally:
        # what is under way ends by itself; its memory lives as long as the views that it fills
        pool.shutdown(wait=False, cancel_futures=True)


# ── fetch ─────────────────────────────────────────────────────────────────────────────────────


def _fetch(
    source: _Source, records: Mapping[str, Record], progress: Progress
) -> dict[str, torch.UntypedStorage]:
    """Bring records into fresh storages: coalesced ranges, in parallel, each record checked."""
    storages = {key: torch.UntypedStorage(record.size) for key, record in records.items()}
    views = {key: _memory(storage) for key, storage in storages.items() if storage.nbytes()}
    headers = {key: bytearray(records[key].start - records[key].header) for key in views}
    total = sum(record.size for record in records.values())
    parts = [
        part
        for offset, pieces in _spans(records, views, headers)
        for part in _cut(offset, pieces, _part_bytes(source, total))
    ]
    missing = Counter(owner for _, pieces in parts for _, owner in pieces)
    lock = threading.Lock()

    def bring(offset: int, pieces: _Pieces) -> None:
        source.read(offset, [view for view, _ in pieces], notify)
        for _, owner in pieces:
            with lock:
                missing[owner] -= 1
                whole = owner and not missing[owner]
            if whole:  # checked here, while other parts are still on their way
                _verify(source, records[owner], headers[owner], views[owner])

    with _shown(source.uri, total, progress) as notify:
        tasks = [functools.partial(bring, *part) for part in parts]
        _in_parallel(tasks, source.uri.connections)
    return storages


def _spans(
    records: Mapping[str, Record], views: Mapping[str, Any], headers: Mapping[str, Any]
) -> Iterator[tuple[int, _Pieces]]:
    """Lay records that stand side by side in a row: header, bytes, gap, header, bytes, …."""
    keys = sorted(views, key=lambda key: records[key].header)
    bridged = _bridged_gaps([records[key] for key in keys])
    span: tuple[int, _Pieces] = (0, [])
    end = 0
    for key in keys:
        record = records[key]
        if record.header in bridged:
            span[1].append((memoryview(bytearray(record.header - end)), ""))
        else:
            yield span
            span = (record.header, [])
        span[1].extend(((memoryview(headers[key]), key), (views[key], key)))
        end = record.start + record.size
    yield span


def _verify(source: _Source, record: Record, header: Any, view: memoryview) -> None:
    """Check what came for a record; where it is wrong, bring it once more."""
    start = data_start(source.uri, record, header)
    if start != record.start or not crc_matches(record, view):
        source.read(start, [view])  # not laid out as by torch, or damaged on the way
        check(source.uri, record, view)


def _bridged_gaps(records: Sequence[Record]) -> set[int]:
    """Choose the gaps to read over, smallest first: a request costs more than a few bytes."""
    gaps = sorted(
        (after.header - before.start - before.size, after.header)
        for before, after in itertools.pairwise(records)
    )
    bridged, left = set(), GAP_BYTES
    for gap, header in gaps:
        left -= gap
        if left < 0:
            break
        bridged.add(header)
    return bridged


def _memory(storage: torch.UntypedStorage) -> memoryview:
    """Give a writable view of a storage's own memory, which keeps the storage alive."""
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    buffer.storage = storage  # type: ignore[attr-defined] # ctypes arrays take any
    return memoryview(buffer).cast("B")


# ── load ──────────────────────────────────────────────────────────────────────────────────────


def load(
    uri: str | os.PathLike[str] | URI,
    *strategies: Strategy,
    transport_params: Params = None,
    progress: Progress = None,
) -> Any:
    """Load a checkpoint, moving only the bytes that survive the strategies.

    ``load(uri, f, g)`` equals ``g(f(load(uri)))``. Tensors come on the CPU, bit for bit as
    `torch.load` gives them; each record is checked against its CRC-32; no code of the
    checkpoint runs. The strategies run at least twice: on a hollow checkpoint, whose tensors
    are on the meta device, to see what is needed, and on the real one.

    Args:
        uri: where it is: a path, or ``s3://``, ``gs://``, ``az://``, ``https://``, ….
        strategies: pure functions from checkpoint to checkpoint, applied from left to right.
        transport_params: smart-open's: ``{"client": …}`` for S3, GCS and Azure,
            ``{"session": …, "headers": …}`` for HTTP.
        progress: None shows a bar in a terminal or notebook where loading takes over a second;
            True and False force and forbid it; a function is called with the bytes done and in all
            (None if the place does not tell).

    Raises:
        CheckpointError: says where, what is wrong and what to do.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/last.ckpt"
    >>> torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, path)
    >>> load(path, lambda checkpoint: checkpoint["state_dict"])
    {'w': tensor([1., 1.])}
    """
    return _load(parse_uri(uri), strategies, transport_params, progress).checkpoint


load.takes_strategies = True  # type: ignore[attr-defined] # strategies.compose hands them over


@frozen
class _Loaded:
    """What a load gave, and what it took, in bytes."""

    checkpoint: Any
    moved: int
    stored: int


def _load(
    place: URI, strategies: Sequence[Strategy], transport_params: Params, progress: Progress
) -> _Loaded:
    for strategy in strategies:
        if not callable(strategy):
            raise TypeError(f"a strategy is a function of a checkpoint, not {strategy!r}")
    try:
        source, blocks = _open_source(place, transport_params)
        checkpoint = _read_checkpoint(place, source, blocks, strategies, progress)
        return _Loaded(checkpoint, sum(source.moved), source.size)
    except _UnrangedError:
        with _shown(place, None, progress) as notify:
            data = _stream_whole(place, transport_params, notify)
        checkpoint = _read_checkpoint(place, *_hold(place, data), strategies, progress=False)
        return _Loaded(checkpoint, len(data), len(data))


def _read_checkpoint(
    place: URI, source: _Source, blocks: _Blocks, strategies: Sequence[Strategy], progress: Progress
) -> Any:
    """Read what a source holds, whichever of torch's formats it is in."""
    suffix = _compression(place)
    if suffix:
        source, blocks = _hold(place, _decompressed(place, _read_whole(source, progress), suffix))
    start = blocks.read(BLOCK_BYTES)
    if not start.startswith(LOCAL_SIGNATURE):
        return _applied(place, strategies, _load_legacy(place, source, start, progress))
    directory = read_directory(place, io.BufferedReader(blocks, BLOCK_BYTES))
    if is_packed(directory):
        source, blocks = _hold(place, unpacked(place, _read_whole(source, progress)))
        directory = read_directory(place, io.BufferedReader(blocks))
    archive = read_archive(place, io.BufferedReader(blocks), directory)
    return _survivors(source, archive, strategies, progress)


def _applied(place: URI, strategies: Sequence[Strategy], checkpoint: Any) -> Any:
    """Put a checkpoint through the strategies; an error of theirs says what was being loaded."""
    try:
        for strategy in strategies:
            checkpoint = strategy(checkpoint)
    except Exception as err:
        err.add_note(f"while loading {redact(str(place))}")
        raise
    return checkpoint


def _survivors(
    source: _Source, archive: Archive, strategies: Sequence[Strategy], progress: Progress
) -> Any:
    """Run the strategies, fetch what their result still needs, and again until it needs nothing.

    On the first round nothing is there and the checkpoint is hollow; on the second, as a rule
    the last, all that the result needs is.
    """
    storages: dict[str, torch.UntypedStorage] = {}
    fresh: dict[str, torch.UntypedStorage] = {}
    while True:
        absent = archive.records.keys() - storages.keys()
        ledger = Ledger()
        try:
            result = build(archive, storages, fresh, ledger)
            with ledger if absent else nullcontext():
                result = _applied(source.uri, strategies, result)
            gc.collect(1)  # what was dropped may hang in a cycle
            needed = ledger.origins() & absent
            if not needed and absent and _has_hollow(result):  # made like one, of its device
                needed = absent
            if absent and ledger.asked:  # for values, and a strategy went on without
                needed = absent
        except Exception as err:
            if not (absent and (ledger.asked or asks_for_values(err))):
                raise
            needed = absent
        if not needed:
            return result
        result = None  # some of its tensors are hollow
        fresh = _fetch(source, {key: archive.records[key] for key in needed}, progress)
        storages |= fresh


def _has_hollow(result: Any) -> bool:
    leaves = tree_leaves(result)
    return any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves)


def _compression(uri: URI) -> str:
    """Give the ending of a name that smart-open knows to decompress, or nothing."""
    suffix = Path(uri.filename).suffix.lower()
    return suffix if suffix in {".gz", ".bz2", ".xz", ".zst", ".lz4"} else ""


def _decompressed(uri: URI, data: bytes | bytearray, suffix: str) -> bytes:
    compression = _package("smart_open.compression", uri)
    try:
        with compression.compression_wrapper(io.BytesIO(data), "rb", compression=suffix) as stream:
            return bytes(stream.read())
    except ImportError as err:
        raise MissingPackageError(
            uri, f"{suffix} needs a package that is not installed ({err})", "install it"
        ) from err
    except Exception as err:
        raise CorruptError(
            uri, f"it cannot be decompressed as {suffix} ({err!r})", "was its upload complete?"
        ) from err


def _load_legacy(uri: URI, source: _Source, start: bytes, progress: Progress) -> Any:
    """Load a file of torch before 1.6, which has no directory, whole."""
    if not start.startswith(b"\x80"):  # a pickle's first byte
        raise NotACheckpointError(uri, *_looks_like(start))
    data = io.BytesIO(_read_whole(source, progress))
    try:
        return torch.load(data, "cpu", weights_only=True)
    except Exception as err:
        refused = re.search(r"GLOBAL (\S+)", str(err))
        if refused:
            raise UnsafeCheckpointError(
                uri,
                f"torch does not know {refused[1]}, which it names, to be safe",
                "allow what you trust with torch.serialization.add_safe_globals([…])",
            ) from err
        raise CorruptError(
            uri, f"torch cannot read it as a legacy file ({err!r})", "fetch it anew"
        ) from err


def _looks_like(start: bytes) -> tuple[str, str]:
    """Tell problem and remedy from the first bytes of what is no checkpoint."""
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is an HTML or XML page", "is the URL that of the file, and not of its page?"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer", "run `git lfs pull`, or give the URL of the file"
    return f"it begins with {start[:16]!r}, as no checkpoint does", "give a file of torch.save"


# ── keep ──────────────────────────────────────────────────────────────────────────────────────


def download(
    uri: str | os.PathLike[str] | URI,
    to: str | os.PathLike[str] = ".",
    *,
    transport_params: Params = None,
    progress: Progress = None,
) -> Path:
    """Copy a checkpoint to a file, whole and in parallel ranges, and give the file's path.

    The file appears when all of it is there; what was there before stays until then. All reads
    are of one version of the object. The bytes are those that are stored: nothing is
    decompressed, and no CRC is looked at before the file is loaded.

    Args:
        uri: where it is.
        to: the file to write, or an existing folder to write it into under its own name.
        transport_params: as for `load`.
        progress: as for `load`.

    Raises:
        CheckpointError: as `load`.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"epoch": 3}, folder / "last.ckpt")
    >>> load(download(folder / "last.ckpt", folder / "copy.ckpt"))
    {'epoch': 3}
    """
    place = parse_uri(uri)
    target = Path(to).expanduser()
    if target.is_dir():
        target /= place.filename
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")  # no other call's
    whole = part.with_suffix(".whole")
    try:
        part.touch()
        try:
            _copy(place, part, transport_params, progress)
            part.replace(target)
        except _UnrangedError:  # what is under way may still write to the part
            with _shown(place, None, progress) as notify:
                whole.write_bytes(_stream_whole(place, transport_params, notify))
            whole.replace(target)
    finally:
        part.unlink(missing_ok=True)
        whole.unlink(missing_ok=True)
    return target


def _copy(place: URI, part: Path, transport_params: Params, progress: Progress) -> None:
    def bring(offset: int) -> None:
        block = bytearray(min(PART_BYTES, source.size - offset))
        source.read(offset, [block], notify)
        with part.open("r+b") as file:
            file.seek(offset)
            file.write(block)

    source, _ = _open_source(place, transport_params)
    with _shown(place, source.size, progress) as notify:
        offsets = range(0, source.size, PART_BYTES)
        tasks = [functools.partial(bring, offset) for offset in offsets]
        _in_parallel(tasks, place.connections)


# ── install ───────────────────────────────────────────────────────────────────────────────────


_IN_MEMORY = "a checkpoint in memory"


def load_into(  # noqa: PLR0913 - by keyword
    model: torch.nn.Module,
    checkpoint: str | os.PathLike[str] | URI | Mapping[str, Any],
    *strategies: Strategy,
    strict: bool = False,
    require: float = 0.0,
    optimizer: Any = None,
    scheduler: Any = None,
    transport_params: Params = None,
    progress: Progress = None,
) -> Report:
    """Load a checkpoint's weights into a model, all or nothing, and report what was loaded.

    Only what fits is moved. Tensors of the model keep their dtype and device, tied ones stay
    tied; a model on the meta device gets its tensors on the CPU.

    Args:
        model: what to load into.
        checkpoint: where it is, or a checkpoint (or state dict) that was loaded before.
        strategies: as for `load`.
        strict: nothing may be missing, unexpected or of another shape.
        require: least share of the model's values that must be loaded, from 0 to 1.
        optimizer: gets its state where the checkpoint has it; a list where there are several.
        scheduler: likewise.
        transport_params: as for `load`.
        progress: as for `load`.

    Raises:
        MismatchError: shapes differ (that no strategy left out), nothing fits, or less than was
            required. The model is as it was.
        CheckpointError: as `load`.

    >>> model = torch.nn.Linear(2, 1)
    >>> report = load_into(model, {"weight": torch.ones(1, 2), "extra": torch.ones(3)})
    >>> report.loaded, report.missing, report.unexpected
    (('weight',), ('bias',), ('extra',))
    """
    begun = time.perf_counter()
    if not 0 <= require <= 1:
        raise ValueError(f"require is a share from 0 to 1, not {require!r}")
    receivers = {"optimizer": _several(optimizer), "scheduler": _several(scheduler)}
    held = checkpoint if isinstance(checkpoint, Mapping) else None
    place = LocalURI(_IN_MEMORY, "") if isinstance(checkpoint, Mapping) else parse_uri(checkpoint)
    before: list[Before] = []

    def begin(given: Any) -> Any:
        before[:] = [look(given)]
        return given

    def end(given: Any) -> Any:
        found = match(place.text, model, given, before[0], receivers)
        check_enough(place.text, model, found, require, strict=strict)
        return found

    every = (begin, *strategies, end)
    if held is None:
        loaded = _load(place, every, transport_params, progress)
    else:
        loaded = _Loaded(_applied(place, every, held), 0, 0)
    found: Match = loaded.checkpoint
    restored = install(model, found, receivers)
    absent = {*found.missing, *found.mismatched}
    return Report(
        place=place.text,
        loaded=tuple(name for name in model.state_dict() if name not in absent),
        missing=found.missing,
        unexpected=found.unexpected,
        mismatched=found.mismatched,
        renamed=found.renamed,
        restored=restored,
        bytes_moved=loaded.moved,
        bytes_stored=loaded.stored,
        seconds=time.perf_counter() - begun,
        rest=found.rest,
    )


load_into.takes_strategies = True  # type: ignore[attr-defined] # compose(f, partial(load_into, model))


def _several(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [] if given is None else [given]
