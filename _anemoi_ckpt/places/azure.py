"""Azure Blob Storage, through its own SDK and smart-open."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import urllib.parse
from contextlib import closing, suppress
from types import ModuleType
from typing import Any, BinaryIO, ClassVar

from attrs import field, frozen

from _anemoi_ckpt.errors import AccessDeniedError, InvalidURIError, redact
from _anemoi_ckpt.places import (
    LONG_PART_BYTES,
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
from _anemoi_ckpt.places.responses import read_socket
from _anemoi_ckpt.places.sessions import mounted
from _anemoi_ckpt.places.settings import AZURE, StoreSettings, store_settings
from _anemoi_ckpt.places.uploading import Requesting, Upload, committed

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


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
    params: ClassVar[tuple[str, ...] | None] = (
        *("client", "max_concurrency"),
        "buffer_size",  # of smart-open's own reader: it changes nothing here
    )
    writer_params: ClassVar[tuple[str, ...]] = ("blob_kwargs", "min_part_size")  # smart_open's
    credentials: ClassVar[str] = (
        "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or "
        "AZURE_STORAGE_SAS_TOKEN, or install azure-identity and run `az login`"
    )


# ── parse ─────────────────────────────────────────────────────────────────────────────────────

_HOST = re.compile(  # Microsoft's own clouds: others get no credentials of the environment
    r"[\w-]+\.(?:blob|dfs)\.core\.(?:windows\.net|chinacloudapi\.cn|usgovcloudapi\.net)", re.ASCII
)


def parse_azure(text: str) -> URI:
    """Parse ``az://container/blob`` or ``abfss://container@account.dfs.core.windows.net/blob``.

    Raises:
        InvalidURIError: container or blob is empty.
    """
    path, _, query = text.split("://", 1)[1].partition("?")
    if not re.search("(?:^|&)(?:sig|snapshot|versionid)=", query):  # then it is part of the name
        path, query = text.split("://", 1)[1], ""
    authority, slash, path = path.partition("/")
    container, at, host = authority.partition("@")
    account = f"https://{host.replace('.dfs.', '.blob.')}" if at else None
    names = bucket_and_key(text, container + slash + path)
    return AzureURI(text, *names, account, *_parse_query(query))


def is_azure_host(host: str) -> bool:
    """Tell whether a host is a storage account in one of Microsoft's own clouds."""
    return _HOST.fullmatch(host) is not None


def parse_azure_url(text: str) -> URI:
    """Parse ``https://account.blob.core.windows.net/container/blob``.

    Raises:
        InvalidURIError: container or blob is empty.
    """
    url = urllib.parse.urlsplit(text)
    names = bucket_and_key(text, urllib.parse.unquote(url.path.lstrip("/")))
    account = f"https://{url.netloc.replace('.dfs.', '.blob.')}"
    return AzureURI(text, *names, account, *_parse_query(url.query))


def _parse_query(query: str) -> tuple[str | None, str | None, str | None]:
    """Split a query into SAS, snapshot and version: the SDK wants them apart."""
    values = dict(urllib.parse.parse_qsl(query))
    sas = [part for part in query.split("&") if not part.startswith(("snapshot=", "versionid="))]
    return "&".join(sas) or None, values.get("snapshot"), values.get("versionid")


for _scheme in ("az", "azure", "abfs", "abfss", "wasb", "wasbs"):
    register_scheme(_scheme, parse_azure)


# ── client ────────────────────────────────────────────────────────────────────────────────────

log = logging.getLogger("anemoi_ckpt")
_SCOPE = "https://storage.azure.com/.default"  # of tokens for Azure Storage


@forget_clients.register
def forget_azure_clients(uri: AzureURI) -> None:  # noqa: ARG001 - all of them
    """Forget the clients of azure-storage-blob."""
    _make_client.cache_clear()


def client_of(uri: AzureURI, params: Params) -> Any:
    """Give the caller's BlobServiceClient, or ours."""
    check_params(uri, params, writing=True)
    given = (params or {}).get("client")
    if given:
        return given
    package = imported("azure.storage.blob", uri)
    told = _settings(uri)
    url = uri.account_url or told.endpoint_url or (told.account_name and _url_of(told.account_name))
    account = _Account(url, uri.sas, told, uri)
    return _make_client(package, account, timeout_of(params), environment("AZURE_"), os.getpid())


@frozen
class _Account:
    """What a client is made for: all blobs that are reached in one way share it."""

    url: str | None
    sas: str | None = field(repr=False)
    settings: StoreSettings
    uri: AzureURI = field(eq=False)  # errors name it

    @property
    def name(self) -> str | None:
        """The name of the account, in a URL of Azure's."""
        return self.url and self.url.split("://")[1].split(".")[0]


def _settings(uri: AzureURI) -> StoreSettings:
    """Give Anemoi's settings of a container, unless the URL names another account, or a server."""
    told = store_settings(uri.container, AZURE)
    if uri.account_url is None:
        return told
    host = uri.account_url.removeprefix("https://")
    is_own = is_azure_host(host) and told.account_name in {None, host.partition(".")[0]}
    return told if is_own else StoreSettings()


def _url_of(account: str) -> str:
    return f"https://{account}.blob.core.windows.net"


def _credential(asked: _Account, account: str | None) -> Any:
    """Give what the URL or Anemoi's settings say; None if neither does."""
    told = asked.settings
    sas = asked.sas or (told.sas_token or "").removeprefix("?")
    if sas or not told.account_key:
        return sas or None
    name = told.account_name or asked.name or account
    return {"account_name": name, "account_key": told.account_key}


@functools.lru_cache(maxsize=8)
def _make_client(
    package: ModuleType,
    asked: _Account,
    timeout: float,
    variables: tuple[tuple[str, str], ...],
    _pid: int,
) -> Any:
    settings = dict(variables)
    options = {
        "max_single_get_size": LONG_PART_BYTES,
        "max_chunk_get_size": LONG_PART_BYTES,
        "connection_timeout": timeout,
        "read_timeout": timeout,
        "permit_redirects": False,  # Azure sends none; older SDKs follow one with the credentials
        "retry_total": 0,  # one policy of retries for all places: ours
        "transport": _transport(timeout),
    }
    connection = settings.get("AZURE_STORAGE_CONNECTION_STRING")
    account = settings.get("AZURE_STORAGE_ACCOUNT") or settings.get("AZURE_STORAGE_ACCOUNT_NAME")
    told = asked.settings
    is_told = bool(told.sas_token or told.account_key or told.skip_signature)
    is_own = not asked.name or f"AccountName={asked.name};" in f"{connection};"
    if connection and is_own and not is_told:
        try:
            return package.BlobServiceClient.from_connection_string(connection, **options)
        except ValueError as err:
            problem = "AZURE_STORAGE_CONNECTION_STRING is no connection string"
            raise AccessDeniedError(asked.uri, problem, "copy it anew from Azure's portal") from err
    if not (asked.url or account):
        raise AccessDeniedError(asked.uri, "no storage account is named", AzureURI.credentials)
    url = asked.url or _url_of(str(account))
    credential = _credential(asked, account)
    if is_told:
        return package.BlobServiceClient(url, credential, **options)
    # credentials of the environment belong to the environment's account, and to no other
    known = is_azure_host(url.removeprefix("https://"))
    own = known and account and url.startswith(f"https://{account}.")
    key = settings.get("AZURE_STORAGE_KEY") or settings.get("AZURE_STORAGE_ACCOUNT_KEY")
    credential = credential or (own and (key or settings.get("AZURE_STORAGE_SAS_TOKEN"))) or None
    if known and not credential:
        credential = default_credential()
    return package.BlobServiceClient(url, credential, **options)


def _transport(timeout: float) -> Any:
    import requests  # noqa: PLC0415 - comes with azure-core
    from azure.core.pipeline.transport import RequestsTransport  # noqa: PLC0415 - likewise

    session = mounted(requests.Session(), requests)
    return RequestsTransport(
        session=session, session_owner=False, connection_timeout=timeout, read_timeout=timeout
    )


def default_credential() -> Any:
    """Give azure-identity's default credential.

    None where that is not installed, or nobody is logged in: then a public container answers.
    """
    try:
        credential = importlib.import_module("azure.identity").DefaultAzureCredential()
    except ImportError:
        return None
    try:
        credential.get_token(_SCOPE)  # which it keeps
    except importlib.import_module("azure.core.exceptions").ClientAuthenticationError as err:
        log.info("read without a login, because azure-identity finds none: %s", redact(str(err)))
        return None
    return credential


def _blob(uri: AzureURI, transport_params: Params) -> Any:
    """Give the blob's client: a caller's may be of an account, of a container, or of the blob."""
    client = client_of(uri, transport_params)
    _refuse_another(uri, client)
    if not hasattr(client, "get_blob_client"):
        return client
    versions = {"snapshot": uri.snapshot, "version_id": uri.version_id}
    if hasattr(client, "get_container_client"):
        return client.get_blob_client(uri.container, uri.blob, **versions)
    return client.get_blob_client(uri.blob, **versions)


def _container(uri: AzureURI, transport_params: Params) -> Any:
    """Give the container's client."""
    client = client_of(uri, transport_params)
    _refuse_another(uri, client)
    if hasattr(client, "get_container_client"):
        return client.get_container_client(uri.container)
    if hasattr(client, "get_blob_client"):
        return client
    raise InvalidURIError(
        uri, "the client of transport_params is a blob's, and lists nothing", "give a container's"
    )


def _refuse_another(uri: AzureURI, client: Any) -> None:
    """Refuse a caller's client of another container, blob, snapshot or version."""
    names = {"container_name": uri.container, "blob_name": uri.blob}
    versions = {"snapshot": uri.snapshot, "version_id": uri.version_id}
    if hasattr(client, "blob_name"):
        names |= {name: asked for name, asked in versions.items() if asked}
    for name, asked in names.items():
        own = getattr(client, name, asked)
        if own != asked:
            raise InvalidURIError(
                uri,
                f"the client of transport_params is of the {name} {own!r}",
                f"give that of {asked!r}, or of the account",
            )


# ── open ──────────────────────────────────────────────────────────────────────────────────────


@open_stream.register
def open_azure(uri: AzureURI, transport_params: Params = None) -> BinaryIO:
    """Open a blob with smart-open."""
    with explained(uri):
        params = with_client(transport_params, _blob(uri, transport_params))
        azure = imported("smart_open.azure", uri)
        return azure.open(uri.container, uri.blob, "rb", **params)  # type: ignore[no-any-return] # smart-open has no annotations


# ── range ─────────────────────────────────────────────────────────────────────────────────────


class _BodyReadError(Exception):
    """The hook has read the body. Raising leaves the SDK, which would hold all of it in memory."""


@read_range.register
def read_azure_range(
    uri: AzureURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Read a range with Get Blob; the ETag pins the blob. Azure knows no suffix ranges."""
    if offset < 0:
        pin = pin or read_version(uri, transport_params)
        offset = max(0, pin.size + offset)
    versions: list[Version] = []

    def read_body(reply: Any) -> None:
        response = reply.http_response
        if response.status_code not in {200, 206}:
            return  # the SDK raises its own error for it
        with closing(response.internal_response) as inner:
            size = int(inner.headers["Content-Range"].rpartition("/")[2])
            versions.append(pinned(uri, Version(size, inner.headers["ETag"]), pin))
            read_socket(inner.raw, buffers)
        raise _BodyReadError

    with explained(uri, pin), suppress(_BodyReadError):
        blob = _blob(uri, transport_params)
        conditions = imported("azure.core", uri).MatchConditions
        match = {"etag": pin.tag, "match_condition": conditions.IfNotModified} if pin else {}
        blob.download_blob(
            offset=offset,
            length=buffers.size - buffers.filled,
            raw_response_hook=read_body,
            **match,
        )
    return versions[0]


# ── version ───────────────────────────────────────────────────────────────────────────────────


@read_version.register
def read_azure_version(uri: AzureURI, transport_params: Params = None) -> Version:
    """Ask for the blob's properties: size, ETag and Content-MD5."""
    with explained(uri):
        properties = _blob(uri, transport_params).get_blob_properties()
        settings = properties.content_settings
        digests = {"md5": bytes(settings.content_md5)} if settings.content_md5 else {}
        codings = settings.content_encoding or ""
        return Version(properties.size, properties.etag, digests, codings=codings)


# ── list ──────────────────────────────────────────────────────────────────────────────────────


@list_page.register
def list_azure_page(
    uri: AzureURI,
    token: str | None = None,
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List with List Blobs, five thousand a page."""
    with explained(uri):
        container = _container(uri, transport_params)
        listed = container.list_blobs if recursive else container.walk_blobs
        pages = listed(name_starts_with=uri.blob).by_page(token)
        entries = [
            Entry.beneath(uri, blob.name)
            if blob.name.endswith("/")
            else Entry.beneath(uri, blob.name, blob.size, blob.last_modified)
            for blob in next(pages, ())
            if blob.name != uri.blob or not uri.blob.endswith("/")
        ]
        return Page(entries, pages.continuation_token or None)


# ── write ─────────────────────────────────────────────────────────────────────────────────────


@open_writer.register
def open_azure_writer(uri: AzureURI, transport_params: Params = None) -> Writer:
    """Write with smart-open's block upload, whose list of blocks is put when all is written."""

    def opened(upload: Upload) -> Any:
        blob = client_of(uri, transport_params)
        for kind, name in (("container", uri.container), ("blob", uri.blob)):
            # the user's own may be one of the container, or of the blob
            blob = getattr(blob, f"get_{kind}_client", lambda _name, same=blob: same)(name)
        requests = {name: getattr(blob, name) for name in ("stage_block", "commit_block_list")}
        params = with_client(transport_params, Requesting(blob, upload, requests))
        return imported("smart_open.azure", uri).open(uri.container, uri.blob, "wb", **params)

    return committed(uri, uri.snapshot or uri.version_id, opened)


# ── remove ────────────────────────────────────────────────────────────────────────────────────


@remove_object.register
def remove_azure(uri: AzureURI, transport_params: Params = None) -> None:
    """Remove with Delete Blob."""
    with unless_missing(uri):
        _blob(uri, transport_params).delete_blob()
