"""S3, and every store that speaks it, through boto3 and smart-open."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from types import ModuleType
from typing import Any, BinaryIO, ClassVar

from attrs import frozen

from _anemoi_ckpt.errors import USERINFO, InvalidURIError, UnreachableError
from _anemoi_ckpt.places import (
    CONNECTIONS,
    SUFFIX_REFUSED,
    URI,
    Buffers,
    Entry,
    NoSuffixError,
    Page,
    Params,
    UnrangedError,
    Version,
    Writer,
    bucket_and_key,
    check_params,
    connect,
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
from _anemoi_ckpt.places.explained import explained
from _anemoi_ckpt.places.interrupts import interruptible
from _anemoi_ckpt.places.responses import decoded, range_header, read_socket, register_body
from _anemoi_ckpt.places.settings import StoreSettings, store_settings
from _anemoi_ckpt.places.uploading import Requesting, Upload, committed

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class S3URI(URI):
    """An object in S3 or a store that speaks S3: ``s3://bucket/key[?versionId=…]``."""

    bucket: str
    key: str
    version_id: str | None = None

    path_field: ClassVar[str] = "key"
    extra: ClassVar[str | None] = "s3"
    params: ClassVar[tuple[str, ...] | None] = (
        *("client", "session", "client_kwargs", "version_id", "range_chunk_size"),
        *("buffer_size", "defer_seek"),  # of smart-open's own reader: they change nothing here
    )
    writer_params: ClassVar[tuple[str, ...]] = (  # smart_open.s3's
        *("min_part_size", "multipart_upload", "writebuffer"),
    )
    nested_params: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "client_kwargs": (
            "S3.Client",
            *(f"S3.Client.{method}" for method in ("get_object", "head_object", "put_object")),
            *(f"S3.Client.{method}" for method in ("list_objects_v2", "delete_object")),
            *(f"S3.Client.{method}" for method in ("create_multipart_upload", "upload_part")),
            *(f"S3.Client.{verb}_multipart_upload" for verb in ("complete", "abort")),
            *(f"S3.Client.{method}" for method in ("copy_object", "upload_part_copy")),
        )
    }
    credentials: ClassVar[str] = (
        "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL "
        "for a store that is not Amazon's), or give transport_params={'client': …}"
    )


# ── parse ─────────────────────────────────────────────────────────────────────────────────────


_ARN = re.compile(  # of an access point, which boto3 takes for a bucket
    r"(arn:[^/]*?:(?:accesspoint[:/][^/]+|outpost[:/][^/:]+[:/]accesspoint[:/][^/]+))/(.+)",
    re.DOTALL,
)


def parse_s3(text: str) -> URI:
    """Parse ``s3://bucket/key[?versionId=…]``.

    Raises:
        InvalidURIError: bucket, key or version is empty, or there are credentials in it.
    """
    rest, mark, version = text.split("://", 1)[1].partition("?versionId=")
    if mark and not version:
        remedy = "name it, or leave ?versionId= out for the newest"
        raise InvalidURIError(text, "names no version", remedy)
    if arn := _ARN.fullmatch(rest):
        return S3URI(text, arn[1], arn[2], version or None)
    if USERINFO.match(text):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        raise InvalidURIError(text, "has credentials in it", remedy)
    return S3URI(text, *bucket_and_key(text, rest), version or None)


for _scheme in ("s3", "s3a", "s3n"):  # the others are Hadoop's
    register_scheme(_scheme, parse_s3)


# ── client ────────────────────────────────────────────────────────────────────────────────────


@connect.register
def connect_s3(uri: S3URI, transport_params: Params = None) -> None:
    """Make the client of boto3."""
    with explained(uri):
        client_of(uri, transport_params)


@forget_clients.register
def forget_s3_clients(uri: S3URI) -> None:  # noqa: ARG001 - all of them
    """Forget the clients of boto3."""
    _make_client.cache_clear()


def client_of(uri: S3URI, params: Params) -> Any:
    """Give the caller's client of boto3, or ours."""
    check_params(uri, params, writing=True)
    given = params or {}
    options = (given.get("client_kwargs") or {}).get("S3.Client") or {}
    session = given.get("session")
    return given.get("client") or _make_client(
        imported("boto3", uri),
        timeout_of(params),
        environment("AWS_"),
        os.getpid(),
        session,
        StoreSettings() if session else store_settings(uri.bucket),
        tuple(sorted(options.items())),
    )


# What GetObject is told by the caller holds for the other requests that read, too.
_OF_READS = {
    "head_object": (
        *("RequestPayer", "ExpectedBucketOwner", "VersionId"),
        *("SSECustomerAlgorithm", "SSECustomerKey", "SSECustomerKeyMD5"),
    ),
    "list_objects_v2": ("RequestPayer", "ExpectedBucketOwner"),
}


def _asked(uri: S3URI, params: Params, method: str, **options: Any) -> dict[str, Any]:
    """Add what the caller has every such request say, as smart-open's `client_kwargs` have it.

    ``{"S3.Client.get_object": {"RequestPayer": "requester"}}``

    Raises:
        InvalidURIError: the caller would have it say what it says already.
    """
    extra = (params or {}).get("client_kwargs") or {}
    of_get = extra.get("S3.Client.get_object", {})
    shared = {name: of_get[name] for name in _OF_READS.get(method, ()) if name in of_get}
    given = {**shared, **extra.get(f"S3.Client.{method}", {})}
    for name, value in options.items():
        if given.get(name, value) != value:
            raise InvalidURIError(
                uri,
                f"client_kwargs ask for the {name} {given[name]!r}, and not {value!r}",
                "leave one of them out",
            )
    return {**given, **options}


def _object(uri: S3URI, params: Params) -> dict[str, str]:
    """Name the object: its version, too, where the URI or the caller names one."""
    version = _version(uri, params)
    return {"Bucket": uri.bucket, "Key": uri.key, **({"VersionId": version} if version else {})}


def _version(uri: S3URI, params: Params) -> str | None:
    given: str | None = (params or {}).get("version_id")
    if given and uri.version_id and given != uri.version_id:
        raise InvalidURIError(
            uri, f"transport_params name another version, {given}", "leave one of them out"
        )
    return given or uri.version_id


@functools.lru_cache(maxsize=8)
def _make_client(
    boto3: ModuleType,
    timeout: float,
    _environment: object,
    _pid: int,
    session: Any,
    settings: StoreSettings,
    options: tuple[tuple[str, Any], ...],
) -> Any:
    import botocore  # noqa: PLC0415 - comes with boto3
    import botocore.config  # noqa: PLC0415 - likewise

    session, given = session or boto3.Session(), dict(options)
    keyed = "aws_access_key_id" in given or settings.access_key_id is not None
    unkeyed = not keyed and session.get_credentials() is None
    public = settings.skip_signature or unkeyed  # then only a public bucket answers
    config = botocore.config.Config(
        max_pool_connections=CONNECTIONS,
        connect_timeout=timeout,
        read_timeout=timeout,
        retries={"total_max_attempts": 1},  # one policy of retries for all places: ours
        signature_version=botocore.UNSIGNED if public else None,
    )
    config = config.merge(given.pop("config", None) or botocore.config.Config())
    # boto3 asks for a region even where a store has none
    told = {
        "region_name": settings.region or session.region_name or "us-east-1",
        "endpoint_url": settings.endpoint_url,
        "aws_access_key_id": settings.access_key_id,
        "aws_secret_access_key": settings.secret_access_key,
        **given,
    }
    client = session.client("s3", config=config, **told)
    if not _AMAZON.search(client.meta.endpoint_url):  # then it need not know checksums
        known = botocore.config.Config.OPTION_DEFAULTS  # of boto3 1.36 and newer
        names = [
            each
            for each in _CHECKSUMS
            if each in known and not getattr(config, each) and not _is_chosen(each, session)
        ]
        plain = botocore.config.Config(**dict.fromkeys(names, "when_required"))
        client = session.client("s3", config=config.merge(plain), **told)
    http_session = client._endpoint.http_session  # noqa: SLF001 - botocore has no public way
    classes = interruptible(http_session._pool_classes_by_scheme)  # noqa: SLF001 - likewise
    http_session._pool_classes_by_scheme = classes  # noqa: SLF001 - for proxies
    http_session._manager.pool_classes_by_scheme = classes  # noqa: SLF001 - for all others
    return client


_CHECKSUMS = ("request_checksum_calculation", "response_checksum_validation")
_AMAZON = re.compile(r"\.amazonaws\.com(\.cn)?(:\d+)?/?$")


def _is_chosen(name: str, session: Any) -> bool:
    """Tell whether the user says when there are checksums, in the environment or a profile."""
    profile = session._session.get_scoped_config()  # noqa: SLF001 - boto3 has no public way
    return bool(os.environ.get(f"AWS_{name.upper()}") or profile.get(name))


# ── open ──────────────────────────────────────────────────────────────────────────────────────


@open_stream.register
def open_s3(uri: S3URI, transport_params: Params = None) -> BinaryIO:
    """Open an object with boto3: smart-open's reader resumes, even in another version."""
    with explained(uri):
        client = client_of(uri, transport_params)
        named = _object(uri, transport_params)
        body = client.get_object(**_asked(uri, transport_params, "get_object", **named))["Body"]
        register_body(getattr(body, "_raw_stream", None))
        return body  # type: ignore[no-any-return] # boto3 has no annotations


# ── range ─────────────────────────────────────────────────────────────────────────────────────


@read_range.register
def read_s3_range(
    uri: S3URI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Read a range with GetObject; the ETag pins the object."""
    most = int((transport_params or {}).get("range_chunk_size") or 0)
    if not most or offset < 0:
        return _read_once(uri, offset, buffers, pin, transport_params)
    end = offset + buffers.size - buffers.filled
    while True:
        length, filled = min(most, end - offset), buffers.filled
        pin = _read_once(uri, offset, buffers, pin, transport_params, length=length)
        offset += length
        if buffers.filled < filled + length or offset >= min(end, pin.size):
            return pin


def _read_once(  # noqa: PLR0913 - as `read_range`, and how much
    uri: S3URI,
    offset: int,
    buffers: Buffers,
    pin: Version | None,
    transport_params: Params,
    *,
    length: int = 0,
) -> Version:
    """Read a range with one request, of `length` bytes if that is given."""
    options = _object(uri, transport_params)
    options["Range"] = range_header(offset, buffers)
    if length:
        options["Range"] = f"bytes={offset}-{offset + length - 1}"
    if pin and pin.tag:
        options["IfMatch"] = pin.tag
    with explained(uri, pin):
        client = client_of(uri, transport_params)
        try:
            asked = _asked(uri, transport_params, "get_object", **options)
            response = client.get_object(**asked)
        except client.exceptions.ClientError as err:
            status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if offset < 0 and status in SUFFIX_REFUSED:  # by some stores that speak S3
                raise NoSuffixError from err
            raise
        with closing(response["Body"]) as body:
            extent = re.fullmatch(r"bytes \d+-(\d+)/(\d+)", response.get("ContentRange", ""))
            if extent is None:  # some ignore Range
                raise NoSuffixError if offset < 0 else UnrangedError
            size = int(extent[2])
            if offset < 0 and int(extent[1]) != size - 1:
                raise NoSuffixError
            version = pinned(uri, Version(size, response.get("ETag")), pin)
            read_socket(getattr(body, "_raw_stream", body), buffers)
    return version


# ── version ───────────────────────────────────────────────────────────────────────────────────


@read_version.register
def read_s3_version(uri: S3URI, transport_params: Params = None) -> Version:
    """Ask with HeadObject. The ETag of a single-part upload is its MD5, unless KMS encrypts it."""
    options = {**_object(uri, transport_params)}
    options = _asked(uri, transport_params, "head_object", **options)
    with explained(uri):
        client = client_of(uri, transport_params)
        try:
            chosen = os.environ.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "").lower()
            mode = {} if chosen == "when_required" else {"ChecksumMode": "ENABLED"}
            response = client.head_object(**mode, **options)
        except client.exceptions.ClientError as err:
            status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status not in {400, 501}:  # by some stores that know no checksums
                raise
            response = client.head_object(**options)
    names = ("sha256", "sha1", "crc32", "crc32c")
    digests = decoded({name: response.get(f"Checksum{name.upper()}") for name in names})
    tag = response.get("ETag")
    single = re.fullmatch(r'"([0-9a-f]{32})"', tag or "")
    keyed = "SSECustomerAlgorithm" in response  # by a key of the caller's own
    if single and not keyed and response.get("ServerSideEncryption", "AES256") == "AES256":
        digests["md5"] = bytes.fromhex(single[1])
    codings = response.get("ContentEncoding", "")
    return Version(response["ContentLength"], tag, digests, codings=codings)


# ── list ──────────────────────────────────────────────────────────────────────────────────────


@list_page.register
def list_s3_page(
    uri: S3URI,
    token: str | None = None,
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List with ListObjectsV2, a thousand objects a page."""
    if _version(uri, transport_params):
        raise InvalidURIError(uri, "a version names one object, not a folder", "leave it out")
    options = {"Bucket": uri.bucket, "Prefix": uri.key}
    options |= {} if recursive else {"Delimiter": "/"}
    options |= {"ContinuationToken": token} if token else {}
    with explained(uri):
        answer = client_of(uri, transport_params).list_objects_v2(
            **_asked(uri, transport_params, "list_objects_v2", **options)
        )
    entries = [Entry.beneath(uri, each["Prefix"]) for each in answer.get("CommonPrefixes", ())]
    entries += [
        Entry.beneath(uri, each["Key"], each["Size"], each["LastModified"])
        for each in answer.get("Contents", ())
        if each["Key"] != uri.key or not uri.key.endswith("/")  # the mark of an empty folder
    ]
    return Page(entries, answer.get("NextContinuationToken"))


# ── write ─────────────────────────────────────────────────────────────────────────────────────


@open_writer.register
def open_s3_writer(uri: S3URI, transport_params: Params = None) -> Writer:
    """Write with smart-open's multipart upload, which is completed when all is written."""

    def opened(upload: Upload) -> Any:
        client = client_of(uri, transport_params)
        requests = {name: functools.partial(_sent, getattr(client, name)) for name in _REQUESTS}
        requests["create_multipart_upload"] = functools.partial(_created, uri, client)
        requests["complete_multipart_upload"] = functools.partial(_completed, uri, transport_params)
        params = with_client(transport_params, Requesting(client, upload, requests))
        return imported("smart_open.s3", uri).open(uri.bucket, uri.key, "wb", **params)

    return committed(uri, _version(uri, transport_params), opened)


_REQUESTS = ("upload_part", "put_object")


def _sent(method: Callable[..., Any], **options: Any) -> Any:
    """Send a request, its body from the beginning: an attempt before may have read it."""
    if hasattr(options.get("Body"), "seek"):
        options["Body"].seek(0)
    return method(**options)


def _created(uri: S3URI, client: Any, **options: Any) -> Any:
    """Begin an upload.

    Raises:
        UnreachableError: the answer ended before it named the upload; botocore takes none for an
            answer without entries.
    """
    answer = client.create_multipart_upload(**options)
    if "UploadId" not in answer:
        raise UnreachableError(
            uri, "the answer names no upload", "check the network and the server"
        )
    return answer


def _completed(uri: S3URI, params: Params, **options: Any) -> Any:
    """Complete an upload, unless an attempt before has, whose answer was lost.

    Raises:
        UnreachableError: the store knows no such upload, and the object is another. smart-open
            tries that again, too: some stores do not know an upload at once.
    """
    client = client_of(uri, params)
    problem: Exception = EOFError("the answer has no body")
    try:
        answer = client.complete_multipart_upload(**options)
        if "ETag" in answer:
            return answer
    except client.exceptions.ClientError as err:
        if err.response.get("Error", {}).get("Code") != "NoSuchUpload":
            raise
        problem = err
    version = read_version(uri, params)
    if version.tag != _joint_tag(options["MultipartUpload"]["Parts"]):
        remedy = "was it aborted meanwhile? save it again"
        raise UnreachableError(uri, "the store does not know the upload", remedy) from problem
    return {}


def _joint_tag(parts: Sequence[Mapping[str, Any]]) -> str | None:
    """Give the ETag of an object of parts, which is made of theirs; None if those are no MD5s."""
    tags = [each["ETag"].strip('"') for each in parts]
    if not all(re.fullmatch("[0-9a-f]{32}", tag) for tag in tags):
        return None
    digest = hashlib.md5(bytes.fromhex("".join(tags)), usedforsecurity=False).hexdigest()
    return f'"{digest}-{len(tags)}"'


# ── remove ────────────────────────────────────────────────────────────────────────────────────


@remove_object.register
def remove_s3(uri: S3URI, transport_params: Params = None) -> None:
    """Remove with DeleteObject. A bucket with versions keeps those that it had."""
    options = _object(uri, transport_params)
    with explained(uri):
        client_of(uri, transport_params).delete_object(
            **_asked(uri, transport_params, "delete_object", **options)
        )
