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
    params: ClassVar[tuple[str, ...] | None] = ("client", "client_kwargs")
    writer_params: ClassVar[tuple[str, ...]] = (  # smart_open.s3's
        *("min_part_size", "multipart_upload", "writebuffer"),
    )
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
        InvalidURIError: bucket or key is empty, or there are credentials in it.
    """
    rest, _, version = text.split("://", 1)[1].partition("?versionId=")
    if arn := _ARN.fullmatch(rest):
        return S3URI(text, arn[1], arn[2], version or None)
    if USERINFO.match(text):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        raise InvalidURIError(text, "has credentials in it", remedy)
    return S3URI(text, *bucket_and_key(text, rest), version or None)


register_scheme("s3", parse_s3)


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
    given = (params or {}).get("client")
    return given or _make_client(
        imported("boto3", uri), timeout_of(params), environment("AWS_"), os.getpid()
    )


def _asked(params: Params, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the caller has every such request say, as smart-open's `client_kwargs` have it.

    ``{"S3.Client.get_object": {"RequestPayer": "requester"}}``
    """
    extra = (params or {}).get("client_kwargs") or {}
    return {**extra.get(f"S3.Client.{method}", {}), **options}


@functools.lru_cache(maxsize=8)
def _make_client(boto3: ModuleType, timeout: float, _environment: object, _pid: int) -> Any:
    import botocore  # noqa: PLC0415 - comes with boto3
    import botocore.config  # noqa: PLC0415 - likewise

    session = boto3.Session()
    public = session.get_credentials() is None  # then only a public bucket answers
    config = botocore.config.Config(
        max_pool_connections=CONNECTIONS,
        connect_timeout=timeout,
        read_timeout=timeout,
        retries={"total_max_attempts": 1},  # one policy of retries for all places: ours
        signature_version=botocore.UNSIGNED if public else None,
    )
    # boto3 asks for a region even where a store has none
    region = session.region_name or "us-east-1"
    client = session.client("s3", region_name=region, config=config)
    if not _AMAZON.search(client.meta.endpoint_url):  # then it need not know checksums
        known = botocore.config.Config.OPTION_DEFAULTS  # of boto3 1.36 and newer
        names = [each for each in _CHECKSUMS if each in known and not _is_chosen(each, session)]
        plain = botocore.config.Config(**dict.fromkeys(names, "when_required"))
        client = session.client("s3", region_name=region, config=config.merge(plain))
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
    version = {"VersionId": uri.version_id} if uri.version_id else {}
    with explained(uri):
        client = client_of(uri, transport_params)
        options = {"Bucket": uri.bucket, "Key": uri.key, **version}
        body = client.get_object(**_asked(transport_params, "get_object", options))["Body"]
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
    options = {"Bucket": uri.bucket, "Key": uri.key, "Range": range_header(offset, buffers)}
    if pin and pin.tag:
        options["IfMatch"] = pin.tag
    if uri.version_id:
        options["VersionId"] = uri.version_id
    with explained(uri, pin):
        client = client_of(uri, transport_params)
        try:
            response = client.get_object(**_asked(transport_params, "get_object", options))
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
    options = {"Bucket": uri.bucket, "Key": uri.key}
    if uri.version_id:
        options["VersionId"] = uri.version_id
    options = _asked(transport_params, "head_object", options)
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
    if single and response.get("ServerSideEncryption", "AES256") == "AES256":
        digests["md5"] = bytes.fromhex(single[1])
    return Version(response["ContentLength"], tag, digests)


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
    options = {"Bucket": uri.bucket, "Prefix": uri.key}
    options |= {} if recursive else {"Delimiter": "/"}
    options |= {"ContinuationToken": token} if token else {}
    with explained(uri):
        answer = client_of(uri, transport_params).list_objects_v2(
            **_asked(transport_params, "list_objects_v2", options)
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

    return committed(uri, uri.version_id, opened)


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
    options = {"Bucket": uri.bucket, "Key": uri.key}
    options |= {"VersionId": uri.version_id} if uri.version_id else {}
    with explained(uri):
        client_of(uri, transport_params).delete_object(
            **_asked(transport_params, "delete_object", options)
        )
