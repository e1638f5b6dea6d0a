"""HTTP and HTTPS (RFC 9110), through requests and smart-open."""

from __future__ import annotations

import functools
import os
import re
import urllib.parse
from collections.abc import Mapping
from email.message import Message
from types import ModuleType
from typing import Any, BinaryIO, ClassVar

from attrs import frozen

from _anemoi_ckpt.errors import InvalidURIError
from _anemoi_ckpt.places import (
    LONGEST_NAME,
    SUFFIX_REFUSED,
    TIMEOUT_SECONDS,
    URI,
    Buffers,
    NoSuffixError,
    Params,
    UnrangedError,
    Version,
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
from _anemoi_ckpt.unpacking import bounded

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class HTTPURI(URI):
    """A URL, as RFC 9110 has it; its query (a signature, say) is kept as it is."""

    is_url: ClassVar[bool] = True
    conditional: ClassVar[bool] = True  # whether the server that sends the file heeds If-Match
    extra: ClassVar[str | None] = "http"
    params: ClassVar[tuple[str, ...] | None] = ("session", "headers", "user", "password", "cert")
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
    method: str, uri: HTTPURI, params: Params, headers: Mapping[str, str] | None = None
) -> Any:
    """Send a request, and give requests' response before its body is read.

    Redirects are followed to the end for GET alone: a URL that is signed for GET may refuse HEAD.
    """
    given = params or {}
    sent = {**_headers(uri, params), **(headers or {})}
    options: dict[str, Any] = {"headers": sent, "stream": True, "cert": given.get("cert")}
    if "authorization" in map(str.lower, sent):
        options["auth"] = _unchanged  # otherwise requests would take what ~/.netrc has
    if "user" in given:
        options["auth"] = (given["user"], given.get("password", ""))
    session = given.get("session") or _session(imported("requests", uri), os.getpid())
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


def _unchanged(prepared: Any) -> Any:
    """Authorize a request no further."""
    return prepared


# ── open ──────────────────────────────────────────────────────────────────────────────────────


@open_stream.register
def open_http(uri: HTTPURI, transport_params: Params = None) -> BinaryIO:
    """Open a URL with smart-open."""
    with explained(uri):
        reader, requests = imported("smart_open.http", uri), imported("requests", uri)
        params = {
            "session": _session(requests, os.getpid()),
            "timeout": TIMEOUT_SECONDS,
            **(transport_params or {}),
            "headers": _headers(uri, transport_params),
        }
        try:
            stream = reader.open(uri.url, "rb", **params)
        except requests.HTTPError as err:
            err.response.close()  # smart-open 8.0.0 leaves it open
            raise
        register_body(stream.response.raw)
        stream.response.raw.enforce_content_length = True  # as urllib3 does by itself since 2.0
        stream.response.raw.decode_content = True  # some servers compress though nobody asked
        if stream.response.headers.get("Content-Encoding"):
            raw = stream.response.raw
            raw.read = bounded(raw.read, raw.tell, uri)
        return stream  # type: ignore[no-any-return] # smart-open has no annotations


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
        if not partial or response.headers.get("Content-Encoding"):
            raise NoSuffixError if offset < 0 else UnrangedError
        if offset < 0 and int(partial[2]) != int(partial[3]) - 1:
            raise NoSuffixError
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        version = Version(int(partial[3]), tag, _digests(response), _name(response))
        pinned(uri, version, pin)
        if offset >= 0 and int(partial[1]) != offset:
            raise UnrangedError  # a range, but not the one that was asked for
        read_socket(response.raw, buffers)
    return version


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
