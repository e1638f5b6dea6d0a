"""Where a checkpoint can be, and how its bytes are read there: a kind of place after the other.

places · streams · ranges · writing
"""

from __future__ import annotations

import base64
import difflib
import email.utils
import functools
import http.client
import importlib
import io
import json
import os
import re
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, ClassVar, cast

from attrs import evolve, field, fields, frozen

from _ckpt_errors import (
    USERINFO,
    AccessDeniedError,
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    MissingPackageError,
    NotACheckpointError,
    UnreachableError,
    redact,
)

Params = Mapping[str, Any] | None  # smart-open's transport_params
Notify = Callable[[int], object]  # told how many bytes have come, each time some have

CONNECTIONS = 32  # at once: stores cap each connection (80 MB/s or so), not the sum
LONG_PART_BYTES = 64 * 1024**2  # most for a request: so that connections end together
CHUNK_BYTES = 1024**2  # one readinto: how often progress and interrupts are looked at
TIMEOUT_SECONDS = 60.0  # of silence on a connection

# ── places ────────────────────────────────────────────────────────────────────────────────────


@frozen
class URI:
    """A place, as the user wrote it. Each kind of place is a frozen subclass.

    ``str(uri)`` is the text it was parsed from, secrets and all; ``repr(uri)`` hides them.
    """

    text: str = field(repr=lambda text: repr(redact(text)))

    connections: ClassVar[int] = CONNECTIONS
    path_field: ClassVar[str] = "text"  # which field ends with the file's name
    is_url: ClassVar[bool] = False  # whether that is percent-encoded, and has a query
    asked_first: ClassVar[bool] = False  # whether a read must know the object's version, or size
    extra: ClassVar[str | None] = None  # which `pip install 'anemoi-ckpt[extra]'` it needs
    credentials: ClassVar[str] = "check your permissions"  # what to do when access is denied

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return str(getattr(self, self.path_field)).rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        """Give back the text as it was written."""
        return self.text


@frozen
class LocalURI(URI):
    """A file on a disk: a plain or relative path, ``~``, ``pathlib.Path``, or ``file://``."""

    path: str

    path_field: ClassVar[str] = "path"
    connections: ClassVar[int] = min(4, os.cpu_count() or 1)  # threads that copy
    credentials: ClassVar[str] = "make the file readable for the user who runs this"


@frozen
class HTTPURI(URI):
    """A URL, as RFC 9110 has it; its query (a signature, say) is kept as it is."""

    is_url: ClassVar[bool] = True
    conditional: ClassVar[bool] = True  # whether If-Match is looked at by who gives the file
    extra: ClassVar[str | None] = "http"
    credentials: ClassVar[str] = (
        "give credentials in ~/.netrc, in the URL, or as transport_params={'headers': …}; "
        "ask for a new one if the URL is a signed one that has expired"
    )

    @property
    def url(self) -> str:
        """What to ask for."""
        return self.text

    @property
    def headers(self) -> Mapping[str, str]:
        """What to ask with, beside the caller's own."""
        return {}

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return urllib.parse.unquote(urllib.parse.urlsplit(self.url).path).rpartition("/")[2]


@frozen
class S3URI(URI):
    """An object in S3 or a store that speaks S3: ``s3://bucket/key[?versionId=…]``."""

    bucket: str
    key: str
    version_id: str | None = None

    path_field: ClassVar[str] = "key"
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

    path_field: ClassVar[str] = "name"
    asked_first: ClassVar[bool] = True
    extra: ClassVar[str | None] = "gcs"
    credentials: ClassVar[str] = (
        "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, "
        "or give transport_params={'client': …}"
    )


@frozen
class AzureURI(URI):
    """A blob in Azure: ``az://container/blob``, ``abfss://…``, or its ``https://`` address.

    Any of them may end in ``?snapshot=…`` or ``?versionid=…``, and in a SAS.
    """

    container: str
    blob: str
    account_url: str | None = None
    sas: str | None = field(default=None, repr=False)
    snapshot: str | None = None
    version_id: str | None = None

    path_field: ClassVar[str] = "blob"
    asked_first: ClassVar[bool] = True
    extra: ClassVar[str | None] = "azure"
    credentials: ClassVar[str] = (
        "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or "
        "AZURE_STORAGE_SAS_TOKEN, or install azure-identity and run `az login`"
    )


_SCHEME = re.compile(  # MLflow's own have one slash
    r"(runs|models|mlflow-artifacts|[A-Za-z][A-Za-z0-9+.-]+(?=://)):/.*", re.DOTALL
)
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
        known = ", ".join(_PARSERS)
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
        return AzureURI(text, container, blob, account, *_azure_query(url.query))
    return HTTPURI(text)


def _parse_s3(text: str) -> URI:
    rest, _, version = text.split("://", 1)[1].partition("?versionId=")
    if USERINFO.match(text):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        raise InvalidURIError(text, "has credentials in it", remedy)
    return S3URI(text, *_bucket_and_key(text, rest), version or None)


def _parse_gcs(text: str) -> URI:
    path, generation = re.fullmatch(r"\w+://(.*?)(?:#(\d+))?", text, re.DOTALL).groups()  # type: ignore[union-attr] # every text matches
    return GCSURI(text, *_bucket_and_key(text, path), int(generation) if generation else None)


def _parse_azure(text: str) -> URI:
    path, _, query = text.split("://", 1)[1].partition("?")
    if not re.search("(?:^|&)(?:sig|snapshot|versionid)=", query):  # then it is part of the name
        path, query = text.split("://", 1)[1], ""
    authority, slash, path = path.partition("/")
    container, at, host = authority.partition("@")
    account = f"https://{host.replace('.dfs.', '.blob.')}" if at else None
    bucket_and_key = _bucket_and_key(text, container + slash + path)
    return AzureURI(text, *bucket_and_key, account, *_azure_query(query))


def _azure_query(query: str) -> tuple[str | None, str | None, str | None]:
    """Tell the SAS from what it is for: the SDK takes them apart for nobody."""
    values = dict(urllib.parse.parse_qsl(query))
    sas = [part for part in query.split("&") if not part.startswith(("snapshot=", "versionid="))]
    return "&".join(sas) or None, values.get("snapshot"), values.get("versionid")


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


def sibling(uri: URI, name: str) -> URI:
    """Name another file beside one: as it is now, with the same credentials."""

    def beside(value: str) -> str:
        path, mark, query = value.partition("?") if uri.is_url else (value, "", "")
        folder = path[: len(path) - len(path.rpartition("/")[2])]
        return folder + (urllib.parse.quote(name) if uri.is_url else name) + mark + query

    known = {each.name for each in fields(type(uri))}
    changes: dict[str, Any] = dict.fromkeys(known & {"version_id", "generation", "snapshot"})
    changes |= {each: beside(getattr(uri, each)) for each in ("text", uri.path_field)}
    return evolve(uri, **changes)


@functools.singledispatch
def resolve(uri: URI, transport_params: Params = None) -> URI:  # noqa: ARG001 - for handlers
    """Tell where a place's bytes are: a place that knows of other places is asked, once a load.

    What it gives keeps the text that the user wrote.

    Args:
        uri: the place.
        transport_params: as for `open_stream`.

    Raises:
        CheckpointError: as `open_stream`.
    """
    return uri


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
    with explained(uri):
        return open(uri.path, "rb", buffering=0)  # noqa: PTH123 - the caller's to close


@open_stream.register
def _(uri: HTTPURI, transport_params: Params = None) -> BinaryIO:
    with explained(uri):
        reader = imported("smart_open.http", uri)
        params = {
            "session": _http_session(uri),
            "timeout": TIMEOUT_SECONDS,
            **(transport_params or {}),
            "headers": _http_headers(uri, transport_params),
        }
        stream = reader.open(uri.url, "rb", **params)
        stream.response.raw.decode_content = True  # some servers compress though nobody asked
        return stream  # type: ignore[no-any-return]


@open_stream.register
def _(uri: S3URI, transport_params: Params = None) -> BinaryIO:
    # not smart-open's, which goes on where it broke off, be it in another version
    version = {"VersionId": uri.version_id} if uri.version_id else {}
    with explained(uri):
        client = _s3_client(uri, transport_params)
        return client.get_object(Bucket=uri.bucket, Key=uri.key, **version)["Body"]  # type: ignore[no-any-return]


@open_stream.register
def _(uri: GCSURI, transport_params: Params = None) -> BinaryIO:
    with explained(uri):
        params = _with_client(transport_params, _gcs_client(uri, transport_params))
        params.setdefault("get_blob_kwargs", {"generation": uri.generation})
        return imported("smart_open.gcs", uri).open(uri.bucket, uri.name, "rb", **params)  # type: ignore[no-any-return]


@open_stream.register
def _(uri: AzureURI, transport_params: Params = None) -> BinaryIO:
    with explained(uri):
        params = _with_client(transport_params, _azure_blob(uri, transport_params))
        azure = imported("smart_open.azure", uri)
        return azure.open(uri.container, uri.blob, "rb", **params)  # type: ignore[no-any-return]


def imported(name: str, uri: URI) -> ModuleType:
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
    return _make_http_session(imported("requests", uri), os.getpid())


@functools.lru_cache(maxsize=1)
def _make_http_session(requests: ModuleType, _pid: int) -> Any:
    session = requests.Session()
    adapter = requests.adapters.HTTPAdapter(CONNECTIONS, CONNECTIONS, max_retries=0)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _http_headers(uri: HTTPURI, params: Params) -> dict[str, str]:
    """Give what to ask with: a caller's own headers come last, and win."""
    given = (params or {}).get("headers") or {}
    names = {name.lower() for name in given}
    known = {"Accept-Encoding": "identity", **uri.headers}  # ranges count the bytes that are stored
    return {**{k: v for k, v in known.items() if k.lower() not in names}, **given}


def http_request(
    method: str, uri: HTTPURI, params: Params, headers: Mapping[str, str] | None = None
) -> Any:
    """Send a request, and give the reply before its body is read.

    A redirect is followed to the end for GET alone: a URL signed for GET may refuse HEAD.
    """
    given = params or {}
    sent = {**_http_headers(uri, params), **(headers or {})}
    options: dict[str, Any] = {"headers": sent, "stream": True, "cert": given.get("cert")}
    if "authorization" in map(str.lower, sent):
        options["auth"] = _as_it_is  # else ~/.netrc would win
    if "user" in given:
        options["auth"] = (given["user"], given.get("password", ""))
    session = given.get("session") or _http_session(uri)
    return session.request(
        method, uri.url, timeout=_timeout(params), allow_redirects=method == "GET", **options
    )


def _as_it_is(request: Any) -> Any:
    """Authorize a request no further."""
    return request


def _timeout(params: Params) -> float:
    """Give the seconds of silence on a connection after which it counts as lost."""
    return float((params or {}).get("timeout") or TIMEOUT_SECONDS)


def _with_client(params: Params, client: Any) -> dict[str, Any]:
    """Give what smart-open takes: a client has its own timeout."""
    return {k: v for k, v in (params or {}).items() if k != "timeout"} | {"client": client}


def _environment(*prefixes: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(prefixes)))


@functools.singledispatch
def connect(uri: URI, transport_params: Params = None) -> None:
    """Have the client made that many reads at once will want: else each would make one."""


@connect.register
def _(uri: S3URI, transport_params: Params = None) -> None:
    with explained(uri):
        _s3_client(uri, transport_params)


def _s3_client(uri: S3URI, params: Params) -> Any:
    given = (params or {}).get("client")
    return given or _make_s3_client(
        imported("boto3", uri), _timeout(params), _environment("AWS_"), os.getpid()
    )


@functools.lru_cache(maxsize=8)
def _make_s3_client(boto3: ModuleType, timeout: float, _environment: object, _pid: int) -> Any:
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
            connect_timeout=timeout,
            read_timeout=timeout,
            retries={"total_max_attempts": 1},  # one policy of retries for all places: ours
            signature_version=botocore.UNSIGNED if public else None,
        ),
    )


def _gcs_client(uri: GCSURI, params: Params) -> Any:
    given = (params or {}).get("client")
    if given:
        return given
    storage = imported("google.cloud.storage", uri)
    return _make_gcs_client(storage, _environment("GOOGLE_", "STORAGE_", "GCLOUD_"), os.getpid())


@functools.lru_cache(maxsize=8)
def _make_gcs_client(storage: ModuleType, _environment: object, _pid: int) -> Any:
    import google.auth.exceptions  # noqa: PLC0415 - comes with google-cloud-storage

    try:
        return storage.Client()
    except google.auth.exceptions.DefaultCredentialsError:
        return storage.Client.create_anonymous_client()  # only a public bucket will answer
    except OSError:  # the credentials name no project, and objects want none
        return storage.Client("none")


def _azure_client(uri: AzureURI, params: Params) -> Any:
    given = (params or {}).get("client")
    if given:
        return given
    blob = imported("azure.storage.blob", uri)
    return _make_azure_client(blob, uri, _timeout(params), _environment("AZURE_"), os.getpid())


@functools.lru_cache(maxsize=8)
def _make_azure_client(
    package: ModuleType,
    uri: AzureURI,
    timeout: float,
    environment: tuple[tuple[str, str], ...],
    _pid: int,
) -> Any:
    settings = dict(environment)
    options = {
        "max_single_get_size": LONG_PART_BYTES,
        "max_chunk_get_size": LONG_PART_BYTES,
        "connection_timeout": timeout,
        "read_timeout": timeout,
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


def forget_clients() -> None:
    """Have the next call look for credentials anew: what there was, was not enough."""
    for make in (_make_s3_client, _make_gcs_client, _make_azure_client):
        make.cache_clear()


# ── ranges ────────────────────────────────────────────────────────────────────────────────────


@frozen
class Version:
    """Which object a read came from: its size in bytes, and its ETag, generation or the like."""

    size: int
    tag: str | None = None
    digests: Mapping[str, bytes] = field(factory=dict, eq=False, repr=False)  # as far as it tells


class Buffers:
    """Writable buffers, filled one after the other as if they were one (as `os.preadv` does).

    Knows how far it is, so that a read that broke off goes on with the first byte it missed.

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
        """Take buffers of `size` bytes in all from what makes them.

        Each is filled when the next one is asked for: so a file can be written through one.
        """
        made = cls()
        made._begin(iter(buffers), size, notify)
        return made

    def _begin(self, views: Iterator[memoryview], size: int, notify: Notify | None) -> None:
        self._views, self.size, self.filled, self._notify = views, size, 0, notify
        self._rest = next(views, memoryview(b""))

    def readfrom(self, stream: Any) -> None:
        """Fill from a stream with `readinto`, until full or the stream ends."""
        while self._rest:
            count = stream.readinto(self._rest[:CHUNK_BYTES])
            if not count:
                return
            self._advance(count)

    def write(self, data: bytes | memoryview) -> int:
        """Take bytes that an SDK pushes; what is more than the buffers hold is left."""
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
    with explained(uri), closing(open_stream(uri, transport_params)) as stream:
        if not stream.seekable():
            raise UnrangedError
        stream.seek(0, os.SEEK_END)
        size = stream.tell()  # paramiko's seek tells nothing
        version = pinned(uri, Version(size), pin)
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
    with open_stream(uri, transport_params) as stream, explained(uri):
        status = os.fstat(stream.fileno())
        version = Version(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}")
        pinned(uri, version, pin)
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
    headers = {"Range": _range(offset, buffers)}
    tag = pin.tag or "" if pin else ""
    if tag.startswith('"') and uri.conditional:  # RFC 9110 13.1.1: strong ETags alone
        headers["If-Match"] = tag
    with explained(uri, pin), http_request("GET", uri, transport_params, headers) as reply:
        reply.raise_for_status()
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if reply.status_code != 206 or not extent or reply.headers.get("Content-Encoding"):  # noqa: PLR2004 - partial content
            raise UnrangedError
        tag = reply.headers.get("ETag") or reply.headers.get("Last-Modified")
        version = Version(int(extent[2]), tag, _http_digests(reply))
        pinned(uri, version, pin)
        if offset >= 0 and int(extent[1]) != offset:
            raise UnrangedError  # a range, but not the one that was asked for
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
    with explained(uri, pin):
        reply = _s3_client(uri, transport_params).get_object(**options)
        with closing(reply["Body"]) as body:
            if "ContentRange" not in reply:  # some stores that speak S3 ignore Range
                raise UnrangedError
            size = int(reply["ContentRange"].rpartition("/")[2])
            version = pinned(uri, Version(size, reply.get("ETag")), pin)
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
    pin = pin or read_version(uri, transport_params)
    if pin.size:
        start = max(0, pin.size + offset) if offset < 0 else offset
        with explained(uri, pin):
            _gcs_blob(uri, transport_params).download_to_file(
                buffers,
                start=start,
                end=min(start + buffers.size - buffers.filled, pin.size) - 1,
                raw_download=True,
                if_generation_match=int(pin.tag or 0),
                checksum=None,  # a range has none; the archive's CRCs are checked
                timeout=_timeout(transport_params),
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
    conditions = imported("azure.core", uri).MatchConditions
    found: list[Version] = []

    def take(response: Any) -> None:
        reply = response.http_response
        if reply.status_code not in {200, 206}:
            return  # the SDK knows its errors
        with closing(reply.internal_response) as inner:
            total = int(inner.headers["Content-Range"].rpartition("/")[2])
            found.append(pinned(uri, Version(total, inner.headers["ETag"]), pin))
            _read_socket(inner.raw, buffers)
        raise _TakenError

    if offset < 0:  # Azure knows no suffix ranges
        pin = pin or read_version(uri, transport_params)
        offset = max(0, pin.size + offset)
    with explained(uri, pin):
        blob = _azure_blob(uri, transport_params)
        match = {"etag": pin.tag, "match_condition": conditions.IfNotModified} if pin else {}
        length = buffers.size - buffers.filled
        with suppress(_TakenError):
            blob.download_blob(offset=offset, length=length, raw_response_hook=take, **match)
    return found[0]


class _TakenError(Exception):
    """The body was read as it came: Azure's SDK would hold it all, and begin anew if it broke."""


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


@read_version.register
def _(uri: S3URI, transport_params: Params = None) -> Version:
    options = {"Bucket": uri.bucket, "Key": uri.key, "ChecksumMode": "ENABLED"}
    if uri.version_id:
        options["VersionId"] = uri.version_id
    with explained(uri):
        reply = _s3_client(uri, transport_params).head_object(**options)
    names = ("sha256", "sha1", "crc32", "crc32c")
    digests = _decoded({name: reply.get(f"Checksum{name.upper()}") for name in names})
    tag = reply.get("ETag")
    single = re.fullmatch(r'"([0-9a-f]{32})"', tag or "")
    if single and reply.get("ServerSideEncryption", "AES256") == "AES256":  # as AWS has it
        digests["md5"] = bytes.fromhex(single[1])
    return Version(reply["ContentLength"], tag, digests)


@read_version.register
def _(uri: GCSURI, transport_params: Params = None) -> Version:
    with explained(uri):
        blob = _gcs_blob(uri, transport_params)
        blob.reload(timeout=_timeout(transport_params), retry=None)
        digests = _decoded({"crc32c": blob.crc32c, "md5": blob.md5_hash})
        return Version(blob.size, str(blob.generation), digests)


def _gcs_blob(uri: GCSURI, transport_params: Params) -> Any:
    """Name an object, and know nothing of it: else the SDK asks where the object says it is."""
    client = _gcs_client(uri, transport_params)
    return client.bucket(uri.bucket).blob(uri.name, generation=uri.generation)


@read_version.register
def _(uri: AzureURI, transport_params: Params = None) -> Version:
    with explained(uri):
        known = _azure_blob(uri, transport_params).get_blob_properties()
        md5 = known.content_settings.content_md5
        return Version(known.size, known.etag, {"md5": bytes(md5)} if md5 else {})


def _azure_blob(uri: AzureURI, transport_params: Params) -> Any:
    client = _azure_client(uri, transport_params)
    return client.get_blob_client(
        uri.container, uri.blob, snapshot=uri.snapshot, version_id=uri.version_id
    )


def _http_digests(reply: Any) -> dict[str, bytes]:
    """Read the digests of the whole that come with a part of it.

    Repr-Digest is RFC 9530's; x-goog-hash and x-ms-blob-content-md5 are GCS's and Azure's, for
    whoever reads them by URL; X-Linked-Etag is the SHA-256 of what Hugging Face redirects to.
    """
    headers = reply.headers
    found = [("md5", headers.get("x-ms-blob-content-md5", ""))]
    found += re.findall(r"([\w-]+)=:([A-Za-z0-9+/=]+):", headers.get("Repr-Digest", ""))
    found += re.findall(r"(\w+)=([A-Za-z0-9+/=]+)", headers.get("x-goog-hash", ""))
    digests = _decoded({name.lower().replace("sha-", "sha"): text for name, text in found})
    for redirect in reply.history:
        linked = re.fullmatch('"?([0-9a-f]{64})"?', redirect.headers.get("X-Linked-Etag", ""))
        if linked:
            digests["sha256"] = bytes.fromhex(linked[1])
    return digests


def _decoded(digests: Mapping[str, str | None]) -> dict[str, bytes]:
    """Decode base64; what is none tells nothing, as S3's digest of the parts' digests does not."""
    found = {}
    for name, text in digests.items():
        with suppress(ValueError):
            found[name] = base64.b64decode(text or "", validate=True)
    return {name: digest for name, digest in found.items() if digest}


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


def pinned(uri: URI, version: Version, pin: Version | None) -> Version:
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
    "InvalidOperation",  # google-auth's: to renew what is anonymous
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_NETWORK = {"azure", "botocore", "google", "http", "json", "requests", "socket", "ssl", "urllib3"}


@contextmanager
def explained(uri: URI, pin: Version | None = None) -> Iterator[None]:
    """Turn whatever a store raises into a `CheckpointError` that it caused."""
    try:
        yield
    except (CheckpointError, UnrangedError):
        raise
    except Exception as err:  # no SDK names all that it raises
        if isinstance(uri, LocalURI) and isinstance(err, OSError):
            raise _explain_local(uri, err) from err
        problem = _explain(uri, err, pin)
        if isinstance(problem, AccessDeniedError):
            forget_clients()
        raise problem from without_secrets(err)


def _explain(uri: URI, err: Exception, pin: Version | None) -> CheckpointError:
    status, code = next(filter(any, map(_status, links(err))), (0, ""))
    said = f"{type(err).__name__}: {err}" if not status else f"the server answered {status} {code}"
    denied = isinstance(err, PermissionError) or type(err).__name__ in _NO_CREDENTIALS
    if denied or status in (401, 403) or code in _EXPIRED:
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
        return empty_file(uri)
    busy = status in (408, 429) or status >= 500  # noqa: PLR2004 - server errors
    package = type(err).__module__.partition(".")[0]
    lost = isinstance(err, OSError | EOFError) or package in _NETWORK
    misused = isinstance(err, ValueError) and not isinstance(err, json.JSONDecodeError)
    misused = misused or type(err).__name__ == "ParamValidationError"
    if busy or (lost and not status and not misused):
        remedy = "check the host, the endpoint and the network, or try again later"
        problem = UnreachableError(uri, f"no useful answer ({said})", remedy)
        problem.retry_after = _retry_after(err)
        return problem
    return CheckpointError(uri, said, "see the error above, which caused this one")


def empty_file(uri: URI) -> CheckpointError:
    return NotACheckpointError(uri, "the file is empty", "was its upload or download complete?")


def _explain_local(uri: LocalURI, err: OSError) -> CheckpointError:
    path = Path(uri.path)
    scheme = uri.path.partition(":/")[0]
    if scheme in _PARSERS and isinstance(err, FileNotFoundError | NotADirectoryError):
        return CheckpointNotFoundError(
            uri, f"there is no folder {scheme}:", f"write {scheme}:// with two slashes"
        )
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
    if hasattr(err, "get_http_status_code"):  # mlflow
        return err.get_http_status_code(), err.error_code
    status = getattr(err, "status_code", None) or getattr(err, "code", None)  # azure, google
    status = status or getattr(reply, "status_code", None)  # requests
    code = getattr(err, "error_code", None) or getattr(reply, "reason", None) or ""
    return (int(status), str(code)) if isinstance(status, int) else (0, "")


def _retry_after(err: Any) -> float:
    """Read the seconds of a Retry-After header, or until its date (RFC 9110 10.2.3)."""
    reply = getattr(err, "response", None)
    if isinstance(reply, dict):
        headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    else:
        headers = getattr(reply, "headers", None) or {}
    text = str(headers.get("retry-after") or headers.get("Retry-After") or "")
    if text.isdecimal():
        return float(text)
    date = email.utils.parsedate_tz(text)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


def links(err: BaseException) -> Iterator[BaseException]:
    """Give an error and what caused it: smart-open and torch wrap what others say."""
    link: BaseException | None = err
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def without_secrets(err: BaseException) -> BaseException:
    """Give back the error, or a likeness of it if it or its causes show a secret."""
    if any(redact(str(link)) != str(link) for link in links(err)):
        return RuntimeError(f"{type(err).__name__}: {redact(str(err))}")
    return err


# ── writing ───────────────────────────────────────────────────────────────────────────────────

_Writer = AbstractContextManager[BinaryIO]


@functools.singledispatch
def open_writer(uri: URI, transport_params: Params = None) -> _Writer:  # noqa: ARG001 - for handlers
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
        "write to a path, s3://, gs:// or az://, or add @open_writer.register",
    )


@open_writer.register
def _(uri: str | os.PathLike, transport_params: Params = None) -> _Writer:  # type: ignore[misc, type-arg] # as for open_stream
    return open_writer(parse_uri(uri), transport_params)


@open_writer.register
@contextmanager
def _(uri: LocalURI, transport_params: Params = None) -> Iterator[BinaryIO]:  # noqa: ARG001 - a file needs none
    path = Path(uri.path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # no other call's
    try:
        with unwritten(uri), part.open("wb") as stream:
            yield stream
        with unwritten(uri):
            part.replace(path)
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            part.unlink()


@contextmanager
def unwritten(uri: LocalURI) -> Iterator[None]:
    """Turn what a disk raises into a `CheckpointError` that it caused."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as err:
        kind = AccessDeniedError if isinstance(err, PermissionError) else CheckpointError
        kind = CheckpointNotFoundError if isinstance(err, FileNotFoundError) else kind
        remedy = "check the folder, its permissions and the room on the disk"
        raise kind(uri, f"it cannot be written ({err.strerror or err})", remedy) from err


@open_writer.register
def _(uri: S3URI, transport_params: Params = None) -> _Writer:
    def opened() -> Any:
        params = _with_client(transport_params, _s3_client(uri, transport_params))
        return imported("smart_open.s3", uri).open(uri.bucket, uri.key, "wb", **params)

    return _committed(uri, uri.version_id, opened)


@open_writer.register
def _(uri: GCSURI, transport_params: Params = None) -> _Writer:
    def opened() -> Any:
        params = _with_client(transport_params, _gcs_client(uri, transport_params))
        return imported("smart_open.gcs", uri).open(uri.bucket, uri.name, "wb", **params)

    return _committed(uri, uri.generation, opened)


@open_writer.register
def _(uri: AzureURI, transport_params: Params = None) -> _Writer:
    def opened() -> Any:
        params = _with_client(transport_params, _azure_client(uri, transport_params))
        return imported("smart_open.azure", uri).open(uri.container, uri.blob, "wb", **params)

    return _committed(uri, uri.snapshot or uri.version_id, opened)


@contextmanager
def _committed(uri: URI, version: object, opened: Callable[[], Any]) -> Iterator[BinaryIO]:
    """Close a store's stream where all went well, which commits the upload, and else abort it."""
    if version is not None:
        raise InvalidURIError(uri, "names a version that is there", "leave the version out")
    with explained(uri):
        stream = opened()
    try:
        yield cast("BinaryIO", _StoreStream(uri, stream))
        with explained(uri):
            stream.close()
    except BaseException:
        with explained(uri):
            stream.terminate()
        raise


class _StoreStream(io.RawIOBase):
    """A store's stream whose own errors are explained; those of who writes to it are not."""

    def __init__(self, uri: URI, stream: Any) -> None:
        self._uri, self._stream = uri, stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with explained(self._uri):
            return int(self._stream.write(data))


for _public in (URI, *URI.__subclasses__(), Version, Buffers, parse_uri, register_scheme):
    _public.__module__ = "anemoi_ckpt"  # where users import it from
