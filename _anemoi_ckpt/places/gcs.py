"""Google Cloud Storage, through its own SDK and smart-open."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from types import ModuleType, SimpleNamespace
from typing import Any, BinaryIO, ClassVar

from attrs import frozen

from _anemoi_ckpt.errors import AccessDeniedError, InvalidURIError
from _anemoi_ckpt.places import (
    URI,
    Buffers,
    Entry,
    Page,
    Params,
    Version,
    Writer,
    bucket_and_key,
    check_params,
    environment,
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
    with_client,
)
from _anemoi_ckpt.places.explained import explained, unless_missing
from _anemoi_ckpt.places.responses import decoded, register_body
from _anemoi_ckpt.places.sessions import mounted
from _anemoi_ckpt.places.uploading import Upload, committed

# ── URI ───────────────────────────────────────────────────────────────────────────────────────

_CONDITIONS = tuple(
    f"if_{what}_{match}"
    for what in ("generation", "metageneration")
    for match in ("match", "not_match")
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
    params: ClassVar[tuple[str, ...] | None] = (
        *("client", "user_project", "get_blob_kwargs", "blob_open_kwargs"),
    )
    writer_params: ClassVar[tuple[str, ...]] = ("blob_properties", "min_part_size")  # smart_open's
    nested_params: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "get_blob_kwargs": ("generation", "encryption_key", "timeout", *_CONDITIONS)
    }
    credentials: ClassVar[str] = (
        "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, "
        "or give transport_params={'client': …}"
    )


# ── parse ─────────────────────────────────────────────────────────────────────────────────────

_TEXT = re.compile(r"\w+://(.*?)(?:#(\d+))?", re.DOTALL)


def parse_gcs(text: str) -> URI:
    """Parse ``gs://bucket/name[#generation]``.

    Raises:
        InvalidURIError: bucket or name is empty.
    """
    path, generation = _TEXT.fullmatch(text).groups()  # type: ignore[union-attr] # every text matches
    return GCSURI(text, *bucket_and_key(text, path), int(generation) if generation else None)


for _scheme in ("gs", "gcs"):
    register_scheme(_scheme, parse_gcs)


# ── client ────────────────────────────────────────────────────────────────────────────────────


@forget_clients.register
def forget_gcs_clients(uri: GCSURI) -> None:  # noqa: ARG001 - all of them
    """Forget the clients of google-cloud-storage."""
    _make_client.cache_clear()


def client_of(uri: GCSURI, params: Params) -> Any:
    """Give the caller's client of google-cloud-storage, or ours."""
    check_params(uri, params, writing=True)
    given = (params or {}).get("client")
    if given:
        return given
    storage = imported("google.cloud.storage", uri)
    return _make_client(storage, environment("GOOGLE_", "STORAGE_", "GCLOUD_"), os.getpid())


@functools.lru_cache(maxsize=8)
def _make_client(storage: ModuleType, _environment: object, _pid: int) -> Any:
    import google.auth.exceptions  # noqa: PLC0415 - comes with google-cloud-storage
    import requests  # noqa: PLC0415 - likewise

    try:
        client = storage.Client()
    except google.auth.exceptions.DefaultCredentialsError:
        client = storage.Client.create_anonymous_client()  # only a public bucket answers
    except OSError:  # the credentials name no project, and objects need none
        client = storage.Client("none")
    mounted(client._http, requests)  # noqa: SLF001 - its session of requests
    return client


def _blob(uri: GCSURI, transport_params: Params) -> Any:
    """Name an object without asking for its properties: the SDK would read from its mediaLink."""
    return _generation_of(uri, _generation(uri, transport_params), transport_params)


def _generation_of(uri: GCSURI, generation: int | None, transport_params: Params) -> Any:
    key = ((transport_params or {}).get("get_blob_kwargs") or {}).get("encryption_key")
    bucket = _bucket(uri, transport_params)
    return bucket.blob(uri.name, generation=generation, encryption_key=key)


def _bucket(uri: GCSURI, transport_params: Params) -> Any:
    """Name the bucket, and who pays."""
    payer = (transport_params or {}).get("user_project")
    return client_of(uri, transport_params).bucket(uri.bucket, user_project=payer)


def _generation(uri: GCSURI, params: Params) -> int | None:
    given = ((params or {}).get("get_blob_kwargs") or {}).get("generation")
    if given and uri.generation and int(given) != uri.generation:
        raise InvalidURIError(
            uri, f"transport_params name another generation, {given}", "leave one of them out"
        )
    return int(given) if given else uri.generation


def _conditions(params: Params) -> dict[str, Any]:
    """Give what each request is to say: how long to wait, and the caller's preconditions."""
    given: dict[str, Any] = {"timeout": timeout_of(params), "retry": None}
    for name in ("blob_open_kwargs", "get_blob_kwargs"):
        extra = (params or {}).get(name) or {}
        given |= {key: extra[key] for key in ("timeout", *_CONDITIONS) if key in extra}
    return given


# ── open ──────────────────────────────────────────────────────────────────────────────────────


@open_stream.register
def open_gcs(uri: GCSURI, transport_params: Params = None) -> BinaryIO:
    """Open an object with its SDK: smart-open's reader names no generation, and nobody who pays."""
    version = read_version(uri, transport_params)
    with explained(uri, version):
        blob = _generation_of(uri, int(version.tag or 0), transport_params)
        return blob.open("rb", raw_download=True, **_conditions(transport_params))  # type: ignore[no-any-return] # the SDK has no annotations


# ── range ─────────────────────────────────────────────────────────────────────────────────────


class _Registering:
    """A client whose responses register their sockets; the user's own is left as it is.

    It refuses the bytes of another generation, which a server may send that knows none.
    """

    def __init__(self, client: Any, uri: GCSURI, pin: Version) -> None:
        self._client, self._uri, self._pin = client, uri, pin

    def __getattr__(self, name: str) -> Any:
        if name == "_http":
            return SimpleNamespace(request=self._request)  # all that a download asks of it
        return getattr(self._client, name)

    def _request(self, *args: Any, **kwargs: Any) -> Any:
        response = self._client._http.request(*args, **kwargs)  # noqa: SLF001 - where downloads send
        register_body(response.raw)
        generation = response.headers.get("X-Goog-Generation", self._pin.tag)
        if response.ok and generation != self._pin.tag:
            response.close()
            pinned(self._uri, Version(self._pin.size, generation), self._pin)
        return response


@read_range.register
def read_gcs_range(
    uri: GCSURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Read a range with `download_to_file` of one generation, which need no longer be the live one.

    A precondition would compare it with the live one.
    """
    pin = pin or read_version(uri, transport_params)
    if pin.size:
        start = max(0, pin.size + offset) if offset < 0 else offset
        with explained(uri, pin):
            _generation_of(uri, int(pin.tag or 0), transport_params).download_to_file(
                buffers,
                client=_Registering(client_of(uri, transport_params), uri, pin),
                start=start,
                end=min(start + buffers.size - buffers.filled, pin.size) - 1,
                raw_download=True,
                checksum=None,  # a range has none; the archive's CRCs are checked
                **_conditions(transport_params),
            )
    return pin


# ── version ───────────────────────────────────────────────────────────────────────────────────


@read_version.register
def read_gcs_version(uri: GCSURI, transport_params: Params = None) -> Version:
    """Ask for the object's properties: size, generation, crc32c and MD5."""
    with explained(uri):
        blob = _blob(uri, transport_params)
        blob.reload(**_conditions(transport_params))
        try:
            digests = decoded({"crc32c": blob.crc32c, "md5": blob.md5_hash})
            codings = blob.content_encoding or ""
            return Version(blob.size, str(blob.generation), digests, codings=codings)
        except AttributeError as err:  # older SDKs take an answer without a body for a dict
            raise EOFError("the answer has no body") from err


# ── list ──────────────────────────────────────────────────────────────────────────────────────


@list_page.register
def list_gcs_page(
    uri: GCSURI,
    token: str | None = None,
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List with Objects: list, a thousand objects a page."""
    options = {"prefix": uri.name, "page_token": token, "delimiter": None if recursive else "/"}
    if _generation(uri, transport_params):
        raise InvalidURIError(uri, "a generation names one object, not a folder", "leave it out")
    with explained(uri):
        blobs, page = _first_page(uri, transport_params, **options)
        entries = [
            Entry.beneath(uri, blob.name, blob.size, blob.updated)
            for blob in page
            if blob.name != uri.name or not uri.name.endswith("/")  # the mark of an empty folder
        ]
        entries += [Entry.beneath(uri, prefix) for prefix in blobs.prefixes]
        return Page(entries, blobs.next_page_token)


def _first_page(uri: GCSURI, transport_params: Params, **options: Any) -> tuple[Any, Any]:
    """Ask for one page: a bucket that is not there has none, whatever the object."""
    bucket, timeout = _bucket(uri, transport_params), timeout_of(transport_params)
    listing = client_of(uri, transport_params).list_blobs(
        bucket, timeout=timeout, retry=None, **options
    )
    return listing, next(listing.pages, ())


# ── write ─────────────────────────────────────────────────────────────────────────────────────


@open_writer.register
def open_gcs_writer(uri: GCSURI, transport_params: Params = None) -> Writer:
    """Write with smart-open's resumable upload, which is finished when all is written."""

    def opened(upload: Upload) -> Any:
        def retry(call: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: upload.request(call)  # as the SDK's own Retry would

        params = with_client(transport_params, client_of(uri, transport_params))
        params["blob_open_kwargs"] = {
            "retry": retry,
            "timeout": timeout_of(transport_params),
            **params.get("blob_open_kwargs", {}),
        }
        return imported("smart_open.gcs", uri).open(uri.bucket, uri.name, "wb", **params)

    return committed(uri, _generation(uri, transport_params), opened)


# ── remove ────────────────────────────────────────────────────────────────────────────────────


_TELLING = re.compile("no such object|bucket does not exist", re.IGNORECASE)  # as Google says it


@remove_object.register
def remove_gcs(uri: GCSURI, transport_params: Params = None) -> None:
    """Remove with Objects: delete. Other servers than Google's do not tell what is missing."""
    timeout = timeout_of(transport_params)
    with unless_missing(uri):
        try:
            _blob(uri, transport_params).delete(timeout=timeout, retry=None)
        except Exception as err:
            if getattr(err, "code", 0) == HTTPStatus.NOT_FOUND and not _TELLING.search(str(err)):
                with suppress(AccessDeniedError), explained(uri):
                    _first_page(uri, transport_params, max_results=1)
            raise
