"""HTTP and HTTPS (RFC 9110), through requests and smart-open."""

from __future__ import annotations

import functools
import gzip
import io
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from email.message import Message
from types import ModuleType
from typing import Any, BinaryIO, ClassVar

from attrs import frozen

from _anemoi_ckpt.errors import CheckpointError, InvalidURIError
from _anemoi_ckpt.places import (
    CHUNK_BYTES,
    LONGEST_NAME,
    SUFFIX_REFUSED,
    URI,
    Buffers,
    NoSuffixError,
    Params,
    UnrangedError,
    Version,
    check_params,
    imported,
    open_stream,
    pinned,
    read_range,
    register_scheme,
    timeout_of,
)
from _anemoi_ckpt.places.azure import is_azure_host, parse_azure_url
from _anemoi_ckpt.places.explained import explained
from _anemoi_ckpt.places.responses import decoded, range_header, read_socket, register_body
from _anemoi_ckpt.places.sessions import mounted
from _anemoi_ckpt.unpacking import GZIP_MARK, SNIFFED_BYTES, bounded, unzipped_start

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class HTTPURI(URI):
    """A URL, as RFC 9110 has it; its query (a signature, say) is kept as it is."""

    is_url: ClassVar[bool] = True
    conditional: ClassVar[bool] = True  # whether the server that sends the file heeds If-Match
    extra: ClassVar[str | None] = "http"
    params: ClassVar[tuple[str, ...] | None] = (
        *("session", "headers", "user", "password", "cert", "kerberos"),
        "buffer_size",  # of smart-open's own reader
    )
    when_changed: ClassVar[str] = (
        f"{URI.when_changed}; if nobody writes to it, several servers answer for this name, and "
        "give it different ETags: name one of them"
    )
    credentials: ClassVar[str] = (
        "give credentials in ~/.netrc, in the URL, or as transport_params={'headers': …}; "
        "ask for a new one if the URL is a signed one that has expired"
    )

    @property
    def url(self) -> str:
        """The URL to ask for."""
        return self.text

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers to send, beside the caller's own."""
        return {}

    @property
    def auth(self) -> Any:
        """What signs a request, as requests has it, unless the caller says who asks; or None."""
        return None

    @property
    def tls(self) -> Mapping[str, Any]:
        """What requests is told of certificates: `verify`, `cert`."""
        return {}

    @property
    def filename(self) -> str:
        """The last part of its path."""
        return urllib.parse.unquote(urllib.parse.urlsplit(self.url).path).rpartition("/")[2]


# ── parse ─────────────────────────────────────────────────────────────────────────────────────


def parse_http(text: str) -> URI:
    """Parse a URL. The URL of a blob in one of Microsoft's clouds is an `AzureURI`.

    Raises:
        InvalidURIError: it has no host.
    """
    url = urllib.parse.urlsplit(text)
    if not url.hostname:
        raise InvalidURIError(text, "the URL has no host", "write https://host/path")
    return parse_azure_url(text) if is_azure_host(url.netloc) else HTTPURI(text)


for _scheme in ("http", "https"):
    register_scheme(_scheme, parse_http)


# ── client ────────────────────────────────────────────────────────────────────────────────────


def request(
    method: str,
    uri: HTTPURI,
    params: Params,
    headers: Mapping[str, str] | None = None,
    data: bytes | None = None,
) -> Any:
    """Send a request, and give requests' response before its body is read.

    Redirects are followed to the end for GET alone: a URL that is signed for GET may refuse HEAD.
    """
    check_params(uri, params)
    given = params or {}
    sent = {**_headers(uri, params), **(headers or {})}
    options: dict[str, Any] = {"headers": sent, "data": data, "stream": True, **uri.tls}
    if given.get("cert"):
        options["cert"] = given["cert"]
    session = given.get("session") or _session(imported("requests", uri), os.getpid())
    options["auth"] = _auth(uri, given, sent, session)
    return session.request(
        method, uri.url, timeout=timeout_of(params), allow_redirects=method == "GET", **options
    )


@functools.lru_cache(maxsize=1)
def _session(requests: ModuleType, _pid: int) -> Any:
    return mounted(requests.Session(), requests)


def _headers(uri: HTTPURI, params: Params) -> dict[str, str]:
    """Give the headers to send: a caller's own come last, and win."""
    given = (params or {}).get("headers") or {}
    names = {name.lower() for name in given}
    known = {"Accept-Encoding": "identity", **uri.headers}  # ranges count the bytes that are stored
    return {**{k: v for k, v in known.items() if k.lower() not in names}, **given}


def _auth(
    uri: HTTPURI, given: Mapping[str, Any], sent: Mapping[str, str], session: Any
) -> Callable[[Any], Any] | None:
    """Give what authorizes a request; None where the session does that by itself, or nothing."""
    if given.get("kerberos"):
        return imported("requests_kerberos", uri, "requests-kerberos").HTTPKerberosAuth()  # type: ignore[no-any-return] # of another package
    requests, pair = imported("requests", uri), (given.get("user"), given.get("password"))
    if pair == (None, None):
        own = "authorization" in map(str.lower, given.get("headers") or {})
        signer = None if own or session.auth else uri.auth
        if signer is not None:
            return signer  # type: ignore[no-any-return] # of a plug-in
        if "authorization" in map(str.lower, sent):
            return _unchanged  # otherwise requests would take what ~/.netrc has
        if session.auth:
            return None
        known = requests.utils.get_netrc_auth(uri.url) if session.trust_env else None
        pair = known or requests.utils.get_auth_from_url(uri.url)  # in the order of requests
    if not any(pair):
        return None
    host = urllib.parse.urlsplit(uri.url).netloc.rpartition("@")[2]
    return _basic_or_digest(requests, host, pair[0] or "", pair[1] or "", os.getpid())


@functools.lru_cache(maxsize=8)
def _basic_or_digest(
    requests: ModuleType, host: str, user: str, password: str, _pid: int
) -> Callable[[Any], Any]:
    """Authorize requests to a host with basic authentication (RFC 7617), or digest (RFC 7616).

    A server that wants the second says so when it gets the first; after that, it gets the second.
    """
    basic = requests.auth.HTTPBasicAuth(user, password)

    class Auth(requests.auth.HTTPDigestAuth):  # type: ignore[misc, name-defined] # imported by the caller
        def __call__(self, prepared: Any) -> Any:
            prepared = super().__call__(prepared)
            return prepared if "Authorization" in prepared.headers else basic(prepared)

        def handle_401(self, response: Any, **options: Any) -> Any:
            asked = urllib.parse.urlsplit(response.request.url).netloc.rpartition("@")[2]
            # what it redirects to is nobody that the credentials are for
            return super().handle_401(response, **options) if asked == host else response

    return Auth(user, password)


def _unchanged(prepared: Any) -> Any:
    """Authorize a request no further."""
    return prepared


# ── open ──────────────────────────────────────────────────────────────────────────────────────


class _Body(io.RawIOBase):
    """The body of a response, which is closed with it."""

    def __init__(self, response: Any, read: Callable[[int], bytes]) -> None:
        self._response, self._read = response, read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._response.close()
        super().close()


@open_stream.register
def open_http(uri: HTTPURI, transport_params: Params = None) -> BinaryIO:
    """Open a URL with one GET, without the coding that a server may give it unasked."""
    with explained(uri):
        response = request("GET", uri, transport_params)
        try:
            response.raise_for_status()
            register_body(response.raw)
            response.raw.enforce_content_length = True  # as urllib3 does by itself since 2.0
            body = _Body(response, _reader(uri, response))
        except BaseException:
            response.close()
            raise
        return io.BufferedReader(body, CHUNK_BYTES)


_NO_CODING = {"", "identity", "none", "aws-chunked"}  # the last is how it came to S3


def _codings(response: Any) -> set[str]:
    """Read the content codings of a body (RFC 9110 8.4)."""
    named = response.headers.get("Content-Encoding", "").lower().split(",")
    return {name.strip() for name in named} - _NO_CODING


def _reader(uri: HTTPURI, response: Any) -> Callable[[int], bytes]:
    """Make what reads the file's own bytes.

    Some servers compress though nobody asked. Others mark as coded what is stored compressed, and
    named so: its first bytes tell which of the two it is.
    """
    raw, codings = response.raw, _codings(response)
    unknown = codings - {*raw.CONTENT_DECODERS}
    suffix = uri.filename.rpartition(".")[2].lower()
    if suffix == "zst" and codings == {"zstd"}:
        unknown = codings = set()
    if unknown:
        raise CheckpointError(
            uri,
            f"the server sends it as {', '.join(sorted(unknown))}, though it was asked not to",
            "install brotli or zstandard, or ask whose server it is to send it as it is",
        )
    read: Any = functools.partial(raw.read, decode_content=bool(codings))
    if suffix == "gz" and codings and codings <= {"gzip", "x-gzip"}:
        start = raw.read(SNIFFED_BYTES, decode_content=False)
        body: Any = _Chained(start, functools.partial(raw.read, decode_content=False))
        if not unzipped_start(start).startswith(GZIP_MARK):
            return body.read  # type: ignore[no-any-return] # of _Chained
        read = gzip.GzipFile(fileobj=body).read
    return bounded(read, raw.tell, uri) if codings else read  # type: ignore[no-any-return] # likewise


class _Chained:
    """Bytes, and what comes after them."""

    def __init__(self, start: bytes, rest: Callable[[int], bytes]) -> None:
        self._start, self._rest = start, rest

    def read(self, size: int) -> bytes:
        if not self._start:
            return self._rest(size)
        data, self._start = self._start[:size], self._start[size:]
        return data


# ── range ─────────────────────────────────────────────────────────────────────────────────────


@read_range.register
def read_http_range(
    uri: HTTPURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Read a range with GET (RFC 9110 14.2); a strong ETag pins the object (13.1.1)."""
    headers = {"Range": range_header(offset, buffers)}
    tag = pin.tag or "" if pin else ""
    if tag.startswith('"') and uri.conditional:  # a weak one begins with W/
        headers["If-Match"] = tag
    with explained(uri, pin), request("GET", uri, transport_params, headers) as response:
        if offset < 0 and response.status_code in SUFFIX_REFUSED:
            raise NoSuffixError
        response.raise_for_status()
        extent = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        partial = response.status_code == 206 and extent  # noqa: PLR2004 - Partial Content
        if not partial or _codings(response):
            raise NoSuffixError if offset < 0 else UnrangedError(_name(response))
        if offset < 0 and int(partial[2]) != int(partial[3]) - 1:
            raise NoSuffixError
        size = int(partial[3])
        version = Version(size, _tag(response), _digests(response), _name(response))
        pinned(uri, version, pin)
        if offset >= 0 and int(partial[1]) != offset:
            raise UnrangedError  # a range, but not the one that was asked for
        read_socket(response.raw, buffers)
    return version


def _tag(response: Any) -> str | None:
    """Read the ETag, or the date, which is as weak as a weak one (RFC 9110 8.8.2.2)."""
    date = response.headers.get("Last-Modified")
    return response.headers.get("ETag") or (date and f"W/{date}")


def _name(response: Any) -> str | None:
    """Read what the server calls the file (RFC 6266), without the folders that it may name."""
    message = Message()
    message["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    name = (message.get_filename() or "").replace("\\", "/").rpartition("/")[2]
    fits = name.isprintable() and len(os.fsencode(name)) <= LONGEST_NAME
    return name if fits and name.strip() and not name.startswith(".") else None


def _digests(response: Any) -> dict[str, bytes]:
    """Read the digests of the whole object that come with a part of it.

    Repr-Digest is RFC 9530's; GCS and Azure send x-goog-hash and x-ms-blob-content-md5 when they
    are read by URL; Hugging Face's X-Linked-Etag is the SHA-256 of the file that it redirects to.
    """
    headers = response.headers
    found = [("md5", headers.get("x-ms-blob-content-md5", ""))]
    found += re.findall(r"([\w-]+)=:([A-Za-z0-9+/=]+):", headers.get("Repr-Digest", ""))
    found += re.findall(r"(\w+)=([A-Za-z0-9+/=]+)", headers.get("x-goog-hash", ""))
    digests = decoded({name.lower().replace("sha-", "sha"): text for name, text in found})
    for redirect in response.history:
        linked = re.fullmatch('"?([0-9a-f]{64})"?', redirect.headers.get("X-Linked-Etag", ""))
        if linked:
            digests["sha256"] = bytes.fromhex(linked[1])
    return digests
