"""Load a PyTorch checkpoint from anywhere, moving only the bytes that are used.

Read from top to bottom, this file is the way a checkpoint takes::

    text ──parse_uri──▶ URI ──open_stream, read_range──▶ bytes
    first + last block ──▶ archive ──▶ hollow checkpoint (every tensor on the meta device)
    hollow ──strategies──▶ the records that the result still needs
    records ──ranges, in parallel, CRC-checked──▶ tensors ──strategies──▶ result

errors · places · streams · ranges · sources · archives · fetch · load
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import gc
import importlib
import io
import logging
import os
import pickle
import random
import re
import struct
import sys
import threading
import time
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, ClassVar

import torch
from attrs import field, frozen
from torch._weights_only_unpickler import (
    Unpickler,
    _get_allowed_globals,
    _get_user_allowed_globals,
    get_globals_in_pkl,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from zlib_ng import zlib_ng

__all__ = [
    "URI",
    "AccessDeniedError",
    "AzureURI",
    "Buffers",
    "ChangedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptError",
    "GCSURI",
    "HTTPURI",
    "InvalidURIError",
    "LocalURI",
    "MissingPackageError",
    "NotACheckpointError",
    "S3URI",
    "UnreachableError",
    "UnsafeCheckpointError",
    "Version",
    "load",
    "open_stream",
    "parse_uri",
    "read_range",
    "register_scheme",
]

log = logging.getLogger("anemoi_ckpt")

Params = Mapping[str, Any] | None  # smart-open's transport_params
Strategy = Callable[[Any], Any]

BLOCK_BYTES = 64 * 1024  # first and last block: holds pickle and directory of most checkpoints
PART_BYTES = 8 * 1024**2  # one request: long against a round trip, short against a retry
CONNECTIONS = 32  # at once: stores cap each connection (80 MB/s or so), not the sum
CHUNK_BYTES = 1024**2  # one readinto: how often progress and interrupts are looked at
GAP_BYTES = 512 * 1024  # most that all gaps bridged between wanted records may cost a load
ATTEMPTS = 5  # without progress, before a place counts as unreachable
TIMEOUT_SECONDS = 60.0  # of silence on a connection
PROGRESS_DELAY_SECONDS = 1.0  # a shorter load shows no bar


# ── errors ────────────────────────────────────────────────────────────────────────────────────


class CheckpointError(Exception):
    """A checkpoint could not be loaded: says where, what is wrong and what to do.

    Pickles (to travel between ranks and workers), and shows no secret.

    >>> raise CheckpointError("s3://b/k?sig=abc", "it is odd", "try again")
    Traceback (most recent call last):
    anemoi_ckpt.CheckpointError: s3://b/k?sig=***: it is odd; try again
    """

    def __init__(self, place: object, problem: str, remedy: str) -> None:
        """Take the place as it was given, what is wrong with it, and what to do next."""
        self.place, self.problem, self.remedy = _redact(str(place)), _redact(problem), remedy
        super().__init__(f"{self.place}: {self.problem}; {self.remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the three parts, not from the one message."""
        return type(self), (self.place, self.problem, self.remedy)


class InvalidURIError(CheckpointError, ValueError):
    """The text names no place that a checkpoint could be at."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such object (or bucket, folder, host's path)."""


class AccessDeniedError(CheckpointError, PermissionError):
    """The place refused: no credentials, wrong ones, or no permission."""


class UnreachableError(CheckpointError, ConnectionError):
    """The place did not answer, or not wholly, after all attempts."""

    retry_after: float = 0.0  # seconds that the server asked for


class ChangedError(CheckpointError, OSError):
    """The object was replaced while it was read."""


class CorruptError(CheckpointError, ValueError):
    """Bytes are missing or wrong."""


class NotACheckpointError(CheckpointError, ValueError):
    """Whatever lies there, torch did not write it."""


class UnsafeCheckpointError(CheckpointError, ValueError):
    """The checkpoint names classes or functions that are not on torch's list of safe ones."""


class MissingPackageError(CheckpointError, ImportError):
    """The place needs a package that is not installed."""


class _UnrangedError(Exception):
    """The place cannot give a part of an object: take it whole."""


_USERINFO = re.compile(r"(?i)\b((?:https?|ftps?|sftp|ssh|s3)://)[^/@\s]+@")
_SECRET = re.compile(
    r"(?i)(?<![\w-])((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId"
    r"|GoogleAccessId|Signature|sig|[\w-]*token|[\w-]*password|AccountKey|SharedAccessSignature)=)"
    r"[^&;\s'\"]+"
)


def _redact(text: str) -> str:
    """Cut passwords in URLs, signatures, tokens and keys out of a text."""
    return _SECRET.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


# ── places ────────────────────────────────────────────────────────────────────────────────────


@frozen
class URI:
    """A place, as the user wrote it. Each kind of place is a frozen subclass.

    ``str(uri)`` is the text it was parsed from, secrets and all; ``repr(uri)`` hides them.
    """

    text: str = field(repr=lambda text: repr(_redact(text)))

    extra: ClassVar[str | None] = None  # which `pip install 'anemoi-ckpt[extra]'` it needs
    credentials: ClassVar[str] = "check your permissions"  # what to do when access is denied

    def __str__(self) -> str:
        """Give back the text as it was written."""
        return self.text


@frozen
class LocalURI(URI):
    """A file on a disk: a plain or relative path, ``~``, ``pathlib.Path``, or ``file://``."""

    path: str

    credentials: ClassVar[str] = "make the file readable for the user who runs this"


@frozen
class HTTPURI(URI):
    """A URL, as RFC 9110 has it; its query (a signature, say) is kept as it is."""

    extra: ClassVar[str | None] = "http"
    credentials: ClassVar[str] = (
        "give credentials in ~/.netrc, in the URL, or as transport_params={'headers': …}; "
        "ask for a new one if the URL is a signed one that has expired"
    )


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


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_AZURE_HOST = re.compile(r"[\w-]+\.(?:blob|dfs)\.core\.[\w.]+(?::\d+)?", re.ASCII)


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
    return parser(text)


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
        return AzureURI(text, container, blob, f"https://{url.netloc}", url.query or None)
    return HTTPURI(text)


def _parse_s3(text: str) -> URI:
    rest, _, version = text.split("://", 1)[1].partition("?versionId=")
    return S3URI(text, *_bucket_and_key(text, rest), version or None)


def _parse_gcs(text: str) -> URI:
    path, generation = re.fullmatch(r"\w+://(.*?)(?:#(\d+))?", text, re.DOTALL).groups()  # type: ignore[union-attr] # every text matches
    return GCSURI(text, *_bucket_and_key(text, path), generation and int(generation))


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
def open_stream(uri: URI, transport_params: Params = None) -> BinaryIO:
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
def _(uri: str | os.PathLike, transport_params: Params = None) -> BinaryIO:  # type: ignore[type-arg] # singledispatch takes no parameters
    return open_stream(parse_uri(uri), transport_params)


@open_stream.register
def _(uri: LocalURI, transport_params: Params = None) -> BinaryIO:  # noqa: ARG001 - a file needs none
    with _explained(uri):
        return open(uri.path, "rb", buffering=0)  # noqa: PTH123, SIM115 - the caller's to close


@open_stream.register
def _(uri: HTTPURI, transport_params: Params = None) -> BinaryIO:
    with _explained(uri):
        http = _package("smart_open.http", uri)
        params = {
            "session": _http_session(uri),
            "timeout": TIMEOUT_SECONDS,
            **(transport_params or {}),
        }
        return http.open(uri.text, "rb", **params)  # type: ignore[no-any-return]


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
        "max_single_get_size": PART_BYTES,
        "max_chunk_get_size": PART_BYTES,
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
    own = account and url.startswith(f"https://{account}.")
    key = settings.get("AZURE_STORAGE_KEY") or settings.get("AZURE_STORAGE_ACCOUNT_KEY")
    credential = uri.sas or (own and (key or settings.get("AZURE_STORAGE_SAS_TOKEN"))) or None
    return package.BlobServiceClient(url, credential or _azure_identity(), **options)


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

    def __init__(self, *buffers: Any, notify: Callable[[int], None] | None = None) -> None:
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

    def write(self, data: bytes) -> int:
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
        size = stream.seek(0, os.SEEK_END)
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
    if "user" in params:
        options["auth"] = (params["user"], params.get("password", ""))
    session = params.get("session") or _http_session(uri)
    with _explained(uri, pin), session.get(uri.text, **options) as reply:
        reply.raise_for_status()
        extent = re.fullmatch(r"bytes \d+-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if reply.status_code != 206 or not extent or reply.headers.get("Content-Encoding"):  # noqa: PLR2004 - partial content
            raise _UnrangedError
        tag = reply.headers.get("ETag") or reply.headers.get("Last-Modified")
        version = _pinned(uri, Version(int(extent[1]), tag), pin)
        buffers.readfrom(reply.raw)
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
            size = int(reply["ContentRange"].rpartition("/")[2])
            version = _pinned(uri, Version(size, reply["ETag"]), pin)
            buffers.readfrom(body)
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
    except Exception as err:
        raise _explain(uri, err, pin) from _without_secrets(err)


def _explain(uri: URI, err: Exception, pin: Version | None) -> CheckpointError:
    status, code = _status(err)
    said = f"{type(err).__name__}: {err}" if not status else f"the server answered {status} {code}"
    if status in (401, 403) or type(err).__name__ in _NO_CREDENTIALS or code in _EXPIRED:
        return AccessDeniedError(uri, f"access is denied ({said})", uri.credentials)
    if pin and status in (404, 410, 412, 416):
        return ChangedError(
            uri, f"the object was replaced or removed while it was read ({said})", "load it again"
        )
    if status in (404, 410):
        return CheckpointNotFoundError(
            uri, f"there is no such object ({said})", "check the name for typing errors"
        )
    if status == 416:  # noqa: PLR2004 - no first byte: RFC 9110 15.5.17
        return _empty(uri)
    if status in (408, 429) or status >= 500:  # noqa: PLR2004 - server errors
        busy = UnreachableError(uri, f"no success ({said})", "try again later")
        busy.retry_after = _retry_after(err)
        return busy
    if isinstance(err, OSError) and isinstance(uri, LocalURI):
        return _explain_local(uri, err)
    if not status and (
        isinstance(err, OSError | EOFError) or type(err).__module__.partition(".")[0] in _NETWORK
    ):
        return UnreachableError(
            uri, f"no answer ({said})", "check the host, the endpoint and the network"
        )
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
        if _redact(str(link)) != str(link):
            return RuntimeError(f"{type(err).__name__}: {_redact(str(err))}")
        link = link.__cause__ or link.__context__
    return err


# ── sources ───────────────────────────────────────────────────────────────────────────────────


@frozen
class _Source:
    """One object, pinned: where all bytes of a load come from, with one policy of retries."""

    uri: URI
    version: Version | None = None
    transport_params: Params = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """Give the object's size in bytes (0 before anything was read)."""
        return self.version.size if self.version else 0

    def read(
        self, offset: int, arrays: Sequence[Any], notify: Callable[[int], None] | None = None
    ) -> Version:
        """Fill the arrays from an offset on; where a read breaks off, go on with what is missing.

        Raises:
            CheckpointError: as `read_range`, after `ATTEMPTS` in a row that brought nothing.
        """
        buffers = Buffers(*arrays, notify=notify)
        attempt, best = 0, 0
        while True:
            if self.version is None:  # what came before may be another object's: begin anew
                buffers = Buffers(*arrays, notify=notify)
            start, problem = offset + buffers.filled, None
            try:
                version = read_range(self.uri, start, buffers, self.version, self.transport_params)
            except UnreachableError as err:
                problem = err
            else:
                first = max(0, version.size + offset) if offset < 0 else offset
                if buffers.filled >= min(buffers.size, version.size - first):
                    return version
                problem = UnreachableError(
                    self.uri,
                    f"the answer ended early, {buffers.filled} bytes after byte {first}",
                    "check the network and the server",
                )
            attempt = 1 if buffers.filled > best else attempt + 1
            best = max(best, buffers.filled)
            if attempt >= ATTEMPTS:
                raise problem
            log.info("attempt %d of %d failed: %s", attempt, ATTEMPTS, problem)
            time.sleep(max(problem.retry_after, random.uniform(0.05, 0.1) * 2**attempt))  # noqa: S311 - jitter


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
    try:
        with ThreadPoolExecutor(2) as pool:
            last = pool.submit(unpinned.read, -BLOCK_BYTES, [tail])
            version = unpinned.read(0, [head])
            if version.size > BLOCK_BYTES:  # else the first block is all there is
                _pinned(uri, last.result(), version)
    except _UnrangedError:
        return _hold(uri, _stream_whole(uri, transport_params))
    if not version.size:
        raise _empty(uri)
    source = _Source(uri, version, transport_params)
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


def _stream_whole(uri: URI, transport_params: Params) -> bytearray:
    """Take all of an object that comes in no parts."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _explained(uri), closing(open_stream(uri, transport_params)) as stream:
                data = bytearray()
                while chunk := stream.read(CHUNK_BYTES):
                    data += chunk
                return data
        except UnreachableError as err:
            if attempt == ATTEMPTS:
                raise
            log.info("attempt %d of %d failed: %s", attempt, ATTEMPTS, err)
            time.sleep(max(err.retry_after, 0.1 * 2**attempt))
    raise AssertionError  # pragma: no cover - the loop returns or raises


def _read_whole(source: _Source) -> bytearray:
    data = bytearray(source.size)
    _in_parallel(
        functools.partial(source.read, offset, [view for view, _ in pieces])
        for offset, pieces in _cut(0, [(memoryview(data), "")])
    )
    return data


_Pieces = list[tuple[memoryview, str]]  # memory to fill, and whose it is


def _cut(offset: int, pieces: _Pieces) -> Iterator[tuple[int, _Pieces]]:
    """Cut a span of an object, which fills pieces of memory, into parts of one request each."""
    part: _Pieces = []
    room = PART_BYTES
    for view, owner in pieces:
        rest = view
        while rest:
            part.append((rest[:room], owner))
            rest, room = rest[room:], room - min(room, len(rest))
            if not room:
                yield offset, part
                offset, part, room = offset + PART_BYTES, [], PART_BYTES
    if part:
        yield offset, part


def _in_parallel(tasks: Iterable[Callable[[], Any]]) -> None:
    """Run all; the first failure, or an interrupt, drops what has not begun and is raised."""
    todo = list(tasks)
    if len(todo) == 1:
        todo[0]()
        return
    pool = ThreadPoolExecutor(min(CONNECTIONS, max(1, len(todo))), "anemoi-ckpt")
    try:
        futures = [pool.submit(task) for task in todo]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ── archives ──────────────────────────────────────────────────────────────────────────────────
#
# A torch zip (PyTorch's "Serialization semantics" note; PKWARE's APPNOTE for the zip) stores the
# pickle as `<root>/data.pkl` and each storage, uncompressed, as `<root>/data/<key>`.


@frozen
class _Record:
    """Where one storage's bytes lie. All in bytes."""

    name: str
    header: int  # offset of the local header (APPNOTE 4.3.7)
    start: int  # offset of the bytes: only the local header knows, this is what torch writes
    size: int
    crc: int | None  # CRC-32, None where the archive was written without


@frozen
class _Archive:
    """A checkpoint that can be built with any of its storages left out."""

    source: _Source
    records: Mapping[str, _Record]  # by storage key
    pickle: bytes
    byteorder: str


def _open_archive(uri: URI, source: _Source, blocks: _Blocks) -> _Archive:
    try:
        directory = zipfile.ZipFile(io.BufferedReader(blocks, BLOCK_BYTES))
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as err:
        raise CorruptError(
            uri,
            f"the zip archive has no readable directory in its {source.size} bytes ({err})",
            "was its upload or download complete?",
        ) from err
    infos = {info.filename: info for info in directory.infolist()}
    found = [name for name in infos if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    if len(found) != 1:
        raise NotACheckpointError(
            uri, "a zip archive without one data.pkl in it", "give a file that torch.save wrote"
        )
    root = found[0].removesuffix("data.pkl")
    storages = [info for name, info in infos.items() if name.startswith(f"{root}data/")]
    small = [infos[name] for name in (found[0], f"{root}byteorder") if name in infos]
    if any(info.compress_type != zipfile.ZIP_STORED for info in (*storages, *small)):
        return _open_archive(uri, *_hold(uri, _restored(uri, source, directory)))
    # torch.serialization.set_crc32_options(False) leaves every CRC at zero
    checked = any(info.CRC for info in infos.values())
    following = [*sorted(info.header_offset for info in infos.values())[1:], directory.start_dir]
    ends = dict(zip(sorted(info.header_offset for info in infos.values()), following, strict=True))

    def record(info: zipfile.ZipInfo) -> _Record:
        end = ends[info.header_offset]
        first = info.header_offset + _LOCAL_HEADER.size + len(info.filename.encode())
        if first + info.file_size > min(end, source.size):
            raise CorruptError(
                uri,
                f"record {info.filename} claims {info.file_size} bytes from byte {first} on, but "
                f"the next begins at byte {end} of {source.size}",
                "fetch or write the file anew",
            )
        wide = max(info.file_size, info.header_offset) >= 0xFFFFFFFF  # noqa: PLR2004 - zip64
        descriptor = (24 if wide else 16) if info.flag_bits & 0x08 and info.file_size else 0
        start = max(first, end - descriptor - info.file_size)
        crc = info.CRC if checked else None
        return _Record(info.filename, info.header_offset, start, info.file_size, crc)

    texts = [_small_record(uri, blocks, record(info)) for info in small]
    return _Archive(
        source,
        {info.filename.removeprefix(f"{root}data/"): record(info) for info in storages},
        texts[0],
        texts[1].decode("ascii", "replace") if len(texts) > 1 else "little",
    )


_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, length of name, length of extra field


def _small_record(uri: URI, blocks: _Blocks, record: _Record) -> bytes:
    blocks.seek(record.header)
    header = blocks.read(_LOCAL_HEADER.size)
    blocks.seek(_data_start(uri, record, header))
    data = blocks.read(record.size)
    _check(uri, record, data)
    return data


def _data_start(uri: URI, record: _Record, header: Any) -> int:
    signature, name, extra = _LOCAL_HEADER.unpack_from(header)
    if signature != b"PK\x03\x04":
        raise CorruptError(
            uri, f"record {record.name} has no header at byte {record.header}", "fetch it anew"
        )
    return record.header + _LOCAL_HEADER.size + int(name) + int(extra)


def _crc_matches(record: _Record, data: Any) -> bool:
    return record.crc is None or zlib_ng.crc32(data) == record.crc


def _check(uri: URI, record: _Record, data: Any) -> None:
    if not _crc_matches(record, data):
        raise CorruptError(
            uri,
            f"the {record.size} bytes of record {record.name} from byte {record.start} on do not "
            f"match their checksum (CRC-32 {zlib_ng.crc32(data):08x}, recorded {record.crc:08x})",
            "the stored file is damaged: fetch or write it anew",
        )


def _restored(uri: URI, source: _Source, directory: zipfile.ZipFile) -> bytes:
    """Write an archive that somebody compressed as torch would have stored it, in memory."""
    claimed = sum(info.file_size for info in directory.infolist())
    if claimed > 64 * max(source.size, 1024**2):  # more than weights deflate to: a zip bomb
        raise CorruptError(
            uri, f"{source.size} bytes claim to be {claimed} unpacked", "do not trust this file"
        )
    plain = io.BytesIO()
    try:
        with (
            zipfile.ZipFile(io.BytesIO(_read_whole(source))) as packed,
            zipfile.ZipFile(plain, "w") as out,
        ):
            for info in packed.infolist():
                out.writestr(info.filename, packed.read(info))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as err:
        raise CorruptError(uri, f"the archive cannot be unpacked ({err})", "fetch it anew") from err
    return plain.getvalue()


# ── fetch ─────────────────────────────────────────────────────────────────────────────────────


def _fetch(
    archive: _Archive, keys: Iterable[str], notify: Callable[[int], None] | None
) -> dict[str, torch.UntypedStorage]:
    """Bring records into fresh storages: coalesced ranges, in parallel, each record checked."""
    source = archive.source
    storages = {key: _fresh_storage(archive.records[key].size) for key in keys}
    views = {key: _memory(storage) for key, storage in storages.items() if storage.nbytes()}
    headers = {
        key: bytearray(archive.records[key].start - archive.records[key].header) for key in views
    }
    parts = [
        part
        for offset, pieces in _spans(archive.records, views, headers)
        for part in _cut(offset, pieces)
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
                _verify(source, archive.records[owner], headers[owner], views[owner])

    _in_parallel(functools.partial(bring, *part) for part in parts)
    return storages


def _spans(
    records: Mapping[str, _Record], views: Mapping[str, Any], headers: Mapping[str, Any]
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


def _verify(source: _Source, record: _Record, header: Any, view: memoryview) -> None:
    """Check what came for a record; where it is wrong, bring it once more."""
    start = _data_start(source.uri, record, header) if header else record.start
    if start != record.start or not _crc_matches(record, view):
        source.read(start, [view])  # not laid out as by torch, or damaged on the way
        _check(source.uri, record, view)


def _bridged_gaps(records: Sequence[_Record]) -> set[int]:
    """Choose the gaps to read over, smallest first: a request costs more than a few bytes."""
    gaps = sorted(
        (after.header - before.start - before.size, after.header)
        for before, after in zip(records, records[1:], strict=False)
    )
    bridged, left = set(), GAP_BYTES
    for gap, header in gaps:
        left -= gap
        if left < 0:
            break
        bridged.add(header)
    return bridged


_HUGE_PAGE_BYTES = 2 * 1024**2
_MADV_HUGEPAGE = 14  # Linux, <asm-generic/mman-common.h>


def _fresh_storage(size: int) -> torch.UntypedStorage:
    """Allocate a storage, in huge pages where it is large: fresh small pages cost more than reads."""
    storage = torch.UntypedStorage(size)
    if size >= 2 * _HUGE_PAGE_BYTES and sys.platform == "linux":
        first = -(-storage.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        length = storage.data_ptr() + size - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return storage


def _memory(storage: torch.UntypedStorage) -> memoryview:
    """Give a writable view of a storage's own memory, for as long as the storage lives."""
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return memoryview(buffer).cast("B")


# ── load ──────────────────────────────────────────────────────────────────────────────────────


def load(
    uri: str | os.PathLike[str] | URI,
    *strategies: Strategy,
    transport_params: Params = None,
    progress: bool | Callable[[int, int], object] | None = None,
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
            True and False force and forbid it; a function is called with bytes done and in all.

    Raises:
        CheckpointError: says where, what is wrong and what to do.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/last.ckpt"
    >>> torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, path)
    >>> load(path, lambda checkpoint: checkpoint["state_dict"])
    {'w': tensor([1., 1.])}
    """
    place = parse_uri(uri)
    for strategy in strategies:
        if not callable(strategy):
            raise TypeError(f"a strategy is a function of a checkpoint, not {strategy!r}")
    source, blocks = _open_source(place, transport_params)
    suffix = _compression(place)
    if suffix:
        source, blocks = _hold(place, _decompressed(place, source, suffix))
    blocks.seek(0)
    start = blocks.read(BLOCK_BYTES)
    if start.startswith(b"PK\x03\x04"):
        return _survivors(_open_archive(place, source, blocks), strategies, progress)
    checkpoint = _load_legacy(place, source, start)
    for strategy in strategies:
        checkpoint = strategy(checkpoint)
    return checkpoint


load.takes_strategies = True  # type: ignore[attr-defined] # strategies.compose hands them over


def _survivors(archive: _Archive, strategies: Sequence[Strategy], progress: Any) -> Any:
    """Run the strategies, fetch what their result still needs, and again until it needs nothing.

    On the first round nothing is there and the checkpoint is hollow; on the second, as a rule
    the last, all that the result needs is.
    """
    storages: dict[str, torch.UntypedStorage] = {}
    while True:
        ledger = _Ledger()
        try:
            result = _build(archive, storages, ledger)
            with ledger if len(storages) < len(archive.records) else nullcontext():
                for strategy in strategies:
                    result = strategy(result)
            gc.collect(1)  # what was dropped may hang in a cycle
            needed = ledger.origins() - storages.keys()
        except Exception as err:
            needed = archive.records.keys() - storages.keys()
            if not (needed and _asks_for_values(err)):
                if not isinstance(err, CheckpointError):
                    err.add_note(f"while loading {_redact(str(archive.source.uri))}")
                raise
        if not needed:
            return result
        result = None
        with _shown(archive, needed, progress) as notify:
            fetched = _fetch(archive, needed, notify)
        if archive.byteorder != sys.byteorder:
            for key, storage in fetched.items():
                storage.byteswap(ledger.dtypes[key])
        storages |= fetched


class _HollowError(Exception):
    """A checkpoint holds something that cannot be built without its values."""


def _asks_for_values(err: Exception) -> bool:
    """Tell whether an error came of a tensor's being on the meta device."""
    if isinstance(err, _HollowError):
        return True
    return isinstance(err, RuntimeError | TypeError | ValueError) and "meta" in str(err).lower()


class _Ledger(TorchDispatchMode):
    """Knows of every living storage which records its values come from.

    Also lets a strategy mix hollow tensors with real ones: what it computes is then hollow.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[int, tuple[StorageWeakRef, set[str]]] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # by storage key

    def enter(self, storage: Any, keys: Iterable[str]) -> None:
        """Note that the values of a storage come from these records, too."""
        # a weak reference keeps the address from being given to another storage
        entry = self._entries.get(storage._cdata) or (StorageWeakRef(storage), set())  # noqa: SLF001 - as torch.multiprocessing does
        self._entries[storage._cdata] = entry  # noqa: SLF001
        entry[1].update(keys)

    def origins(self) -> set[str]:
        """Give the records that living storages have their values from."""
        return {key for ref, keys in self._entries.values() if not ref.expired() for key in keys}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and enter what it made."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        keys = {
            key
            for tensor in given
            for storage in _storages(tensor)
            if storage._cdata in self._entries  # noqa: SLF001
            for key in self._entries[storage._cdata][1]  # noqa: SLF001
        }
        if not keys:
            return func(*args, **kwargs)
        schema = func._schema  # noqa: SLF001 - what tells that an operation writes
        written = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(tensor.is_meta for tensor in given):
            args, kwargs = tree_map(_hollow, (args, kwargs))
            result = func(*args, **kwargs)
            if written and isinstance(written[0], torch.Tensor) and not written[0].is_meta:
                result = written[0]  # a real tensor stays real; its values come later
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves((result, written)):
            if isinstance(tensor, torch.Tensor):
                for storage in _storages(tensor):
                    self.enter(storage, keys)
        return result


def _hollow(leaf: Any) -> Any:
    """Put a tensor, or a device that an operation is to move to, on the meta device."""
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _storages(tensor: torch.Tensor) -> list[Any]:
    """Give all storages of a tensor: a sparse one has several."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]  # noqa: SLF001 - the public ones want it coalesced
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [part.untyped_storage() for part in parts]


def _build(archive: _Archive, storages: Mapping[str, Any], ledger: _Ledger) -> Any:
    """Unpickle a checkpoint with torch's restricted unpickler, on the storages that are there.

    All others are on the meta device, and entered in the ledger under their record's name.
    """
    uri = archive.source.uri
    loaded: dict[str, Any] = {}

    def storage_of(saved: tuple[Any, ...]) -> Any:
        """Answer a persistent id: ("storage", type, key, location, count of elements)."""
        _, kind, key, _, count = saved
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        size = count * torch._utils._element_size(dtype)  # noqa: SLF001 - as torch.load does
        record = archive.records.get(key)
        if record is None or record.size != size:
            held = f"holds {record.size} bytes" if record else "is missing"
            raise CorruptError(
                uri, f"record data/{key} {held}, its tensor has {size}", "fetch the file anew"
            )
        if key not in loaded:
            storage = storages.get(key)
            if storage is None:
                storage = torch.UntypedStorage(size, device="meta")
            loaded[key] = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=dtype, _internal=True
            )
            ledger.enter(storage, [key])
            ledger.dtypes[key] = dtype
        return loaded[key]

    unpickler = Unpickler(io.BytesIO(archive.pickle), encoding="utf-8")
    unpickler.persistent_load = storage_of  # type: ignore[method-assign]
    try:
        return unpickler.load()
    except CheckpointError:
        raise
    except Exception as err:
        unsafe = _unsafe_globals(archive.pickle)
        if unsafe:
            raise UnsafeCheckpointError(
                uri,
                f"it names what torch does not know to be safe: {', '.join(unsafe)}",
                "allow what you trust with torch.serialization.add_safe_globals([…])",
            ) from err
        if isinstance(err, RuntimeError) and len(storages) < len(archive.records):
            raise _HollowError from err
        raise CorruptError(uri, f"its pickle cannot be read ({err!r})", "fetch it anew") from err
    finally:
        torch._utils._validate_loaded_sparse_tensors()  # noqa: SLF001 - as torch.load does


def _unsafe_globals(data: bytes) -> list[str]:
    """List what a pickle names that torch's restricted unpickler refuses."""
    try:
        named = get_globals_in_pkl(io.BytesIO(data))
    except Exception:  # noqa: BLE001 - any garbage may be in there
        return []
    return sorted(named - _get_allowed_globals().keys() - _get_user_allowed_globals().keys())


def _compression(uri: URI) -> str:
    """Give the ending of a name that smart-open knows to decompress, or nothing."""
    path = urllib.parse.urlsplit(uri.text).path if isinstance(uri, HTTPURI) else uri.text
    suffix = Path(path).suffix.lower()
    return suffix if suffix in {".gz", ".bz2", ".xz", ".zst", ".lz4"} else ""


def _decompressed(uri: URI, source: _Source, suffix: str) -> bytes:
    compression = _package("smart_open.compression", uri)
    packed = io.BytesIO(_read_whole(source))
    try:
        with compression.compression_wrapper(packed, "rb", compression=suffix) as stream:
            return bytes(stream.read())
    except ImportError as err:
        raise MissingPackageError(uri, f"{suffix} needs a package ({err})", "install it") from err
    except Exception as err:
        raise CorruptError(
            uri, f"it cannot be decompressed as {suffix} ({err})", "was its upload complete?"
        ) from err


def _load_legacy(uri: URI, source: _Source, start: bytes) -> Any:
    """Load a file of torch before 1.6, which has no directory, whole."""
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        looks, remedy = "an HTML or XML page", "is the URL that of the file, and not of its page?"
    elif text.startswith(b"version https://git-lfs"):
        looks, remedy = "a Git LFS pointer", "run `git lfs pull`, or give the URL of the file"
    elif not start.startswith(b"\x80"):
        looks, remedy = f"none: it begins with {start[:16]!r}", "give a file that torch.save wrote"
    else:
        try:
            return torch.load(io.BytesIO(_read_whole(source)), "cpu", weights_only=True)
        except pickle.UnpicklingError as err:
            raise UnsafeCheckpointError(
                uri,
                f"torch's restricted unpickler refuses it ({str(err).splitlines()[0]})",
                "allow what you trust with torch.serialization.add_safe_globals([…])",
            ) from err
        except CheckpointError:
            raise
        except Exception as err:
            raise CorruptError(
                uri, f"torch cannot read it as a legacy file ({err!r})", "fetch it anew"
            ) from err
    raise NotACheckpointError(uri, f"not a checkpoint, but {looks}", remedy)


@contextmanager
def _shown(
    archive: _Archive, keys: Iterable[str], progress: bool | Callable[[int, int], object] | None
) -> Iterator[Callable[[int], None] | None]:
    """Show how many of the bytes have come."""
    total = sum(archive.records[key].size for key in keys)
    lock = threading.Lock()
    if callable(progress):
        done = 0

        def count(size: int) -> None:
            nonlocal done
            with lock:
                done = min(total, done + size)  # headers come, too
                progress(done, total)

        yield count
    elif progress or (progress is None and (sys.stderr.isatty() or "ipykernel" in sys.modules)):
        from tqdm.auto import tqdm  # noqa: PLC0415 - only where it is shown

        name = _redact(archive.source.uri.text).rpartition("/")[2]
        delay = PROGRESS_DELAY_SECONDS if progress is None else 0
        with tqdm(total=total, desc=name, delay=delay, unit="B", unit_scale=True) as bar:

            def advance(size: int) -> None:
                with lock:
                    bar.update(min(size, total - bar.n))

            yield advance
    else:
        yield None
