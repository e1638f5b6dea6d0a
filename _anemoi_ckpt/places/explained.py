"""What a store's own exception means: a table from what it says to a `CheckpointError`.

Every SDK's exception has the HTTP status in an attribute of its own; some have none, and are known
by their name or by the package that they are from.
"""

from __future__ import annotations

import email.utils
import functools
import json
import re
import ssl
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import frozen

from _anemoi_ckpt.errors import (
    AccessDeniedError,
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    NotACheckpointError,
    UnreachableError,
    redact,
)
from _anemoi_ckpt.places import URI, UnknownParamError, UnrangedError, Version, forget_clients

_NO_CREDENTIALS = {  # names of exceptions
    "ClientAuthenticationError",
    "CredentialRetrievalError",
    "CredentialUnavailableError",
    "DefaultCredentialsError",
    "InvalidOperation",  # google-auth's, of anonymous credentials that it cannot renew
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_PLAIN = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}  # OpenSSL's
_ON_THE_WAY = {  # S3's codes of 400: what was sent came late, in part, or with a bit flipped
    *("BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentChecksumMismatch"),
}
_NETWORK = {"azure", "botocore", "google", "http", "json", "requests", "socket", "ssl", "urllib3"}


@contextmanager
def explained(uri: URI, pin: Version | None = None) -> Iterator[None]:
    """Turn whatever a store raises in the block into a `CheckpointError` that it caused.

    What a stream of the user's own raises, and is none of the errors that stores raise, stays.

    Args:
        uri: the place.
        pin: the version that was asked for, if the object was seen before.
    """
    try:
        yield
    except (CheckpointError, UnknownParamError, UnrangedError, MemoryError):
        raise
    except Exception as err:  # no SDK documents all that it raises
        problem = explain(uri, err, pin)
        is_unknown = type(problem) is CheckpointError and not isinstance(err, OSError)
        if is_unknown and uri.is_users:
            raise
        if isinstance(problem, AccessDeniedError):
            forget_clients(uri)
        raise problem from without_secrets(err)


@contextmanager
def unless_missing(uri: URI) -> Iterator[None]:
    """Do as `explained`, but for an object that is not there, in a bucket that is."""
    try:
        with explained(uri):
            yield
    except CheckpointNotFoundError as err:
        if err.lacks != "object":
            raise


@frozen
class _Complaint:
    """What a store's exception says."""

    err: Exception
    status: int  # of HTTP; 0 where it has none
    code: str  # the store's own
    was_seen: bool  # the object was there before

    def __str__(self) -> str:
        if self.status:
            code = "" if self.code == str(self.status) else self.code  # of an answer to HEAD
            return f"the server answered {self.status} {code}".rstrip()
        return f"{type(self.err).__name__}: {self.err}"


def _is_denied(said: _Complaint) -> bool:
    name = type(said.err).__name__
    known = isinstance(said.err, PermissionError) or name in _NO_CREDENTIALS
    codes = _EXPIRED | {"PublicAccessNotPermitted"}  # the second with 409, by Azure
    return known or said.status in {401, 403} or said.code in codes


def _has_no_key(said: _Complaint) -> bool:
    """Tell whether Azure's SDK could not sign a request."""
    return type(said.err).__name__ == "AzureSigningError"


def _is_hidden(said: _Complaint) -> bool:
    """Tell whether Azure was asked without a login, and says only then that nothing is there."""
    return said.code == "ResourceNotFound"


def _is_replaced(said: _Complaint) -> bool:
    return said.was_seen and said.status in {404, 410, 412, 416}


def _lacks_bucket(said: _Complaint) -> bool:
    if said.code in _NO_BUCKET:
        return True
    text = str(said.err).lower()
    return said.status == 404 and ("bucket does not exist" in text or _names_bucket(said.err))  # noqa: PLR2004 - the first as Google says it


def _names_bucket(err: Any) -> bool:
    """Tell whether GCS was asked for a listing or a new upload, whose URLs name no object."""
    request = getattr(getattr(err, "response", None), "request", None)
    path = urllib.parse.urlsplit(str(getattr(request, "url", ""))).path
    is_first = getattr(request, "method", "") in {"GET", "POST"}  # parts of an upload are PUT
    return is_first and re.fullmatch(r"(/upload)?/storage/v1/b/[^/]+/o", path) is not None


def _is_missing(said: _Complaint) -> bool:
    return said.status in {404, 410} or isinstance(said.err, FileNotFoundError)


def _distrusts(said: _Complaint) -> bool:
    """Tell whether the server's certificate is not trusted, or there is no file of those that are.

    That file's absence is OpenSSL's error, which names no file, or one of requests.
    """
    for link in links(said.err):
        if isinstance(link, ssl.SSLCertVerificationError):
            return True
        if type(link) is FileNotFoundError and _is_raised_in(
            link, ssl.__name__, "urllib3.util.ssl_"
        ):
            return True
    return "TLS CA certificate bundle" in str(said.err)


def _is_raised_in(err: BaseException, *modules: str) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(err.__traceback__))
    return any(frame.f_globals.get("__name__") in modules for frame in frames)


def _speaks_plainly(said: _Complaint) -> bool:
    """Tell whether a server answered without TLS what it was asked with it."""
    reasons = (getattr(link, "reason", None) for link in links(said.err))
    return any(reason in _PLAIN for reason in reasons if isinstance(reason, str))


def _is_empty(said: _Complaint) -> bool:
    return said.status == 416  # noqa: PLR2004 - there is no first byte (RFC 9110 15.5.17)


def _is_unreachable(said: _Complaint) -> bool:
    """Tell whether the server is busy, or the network was lost: another attempt may go well."""
    if said.status:
        busy = said.status in {408, 429} or said.status >= 500  # noqa: PLR2004 - server errors
        return busy or said.code in _ON_THE_WAY
    err = said.err
    misused = isinstance(err, ValueError) and not isinstance(err, json.JSONDecodeError)
    misused = misused or type(err).__name__ == "ParamValidationError"
    package = type(err).__module__.partition(".")[0]
    return (isinstance(err, OSError | EOFError) or package in _NETWORK) and not misused


_CHECK_NAME = "check the name for typing errors"
_Rule = tuple[Callable[[_Complaint], bool], type[CheckpointError], str, str]
_RULES: tuple[_Rule, ...] = (  # when, what, the problem, the remedy (the place's own where empty)
    (
        _has_no_key,
        AccessDeniedError,
        "the account's key is no base64, so nothing can be signed",
        "copy it anew from Azure's portal",
    ),
    (_is_denied, AccessDeniedError, "access is denied", ""),
    (
        _is_replaced,
        ChangedError,
        "the object was replaced or removed while it was read",
        "",
    ),
    (
        _distrusts,
        UnreachableError,
        "its certificate is not trusted, or the file of those that are is not there",
        "name such a file in REQUESTS_CA_BUNDLE (AWS_CA_BUNDLE for S3), or give your own session",
    ),
    (
        _speaks_plainly,
        UnreachableError,
        "the server does not speak TLS",
        "is it http:// there, or another port?",
    ),
    (
        _lacks_bucket,
        CheckpointNotFoundError,
        "there is no such bucket or container",
        "check its name, and the account or endpoint",
    ),
    (
        _is_hidden,
        AccessDeniedError,
        "there is no such object, or it may not be read without a login",
        "",
    ),
    (
        _is_missing,
        CheckpointNotFoundError,
        "there is no such object",
        _CHECK_NAME,
    ),
    (_is_empty, NotACheckpointError, "the file is empty", "was its upload or download complete?"),
    (
        _is_unreachable,
        UnreachableError,
        "no useful answer",
        "check the host, the endpoint and the network, or try again later",
    ),
)


@functools.singledispatch
def explain(uri: URI, err: Exception, pin: Version | None = None) -> CheckpointError:
    """Make a `CheckpointError` of what a place raised; a disk has a handler of its own."""
    status, code = next(filter(any, map(_status, links(err))), (0, ""))
    said = _Complaint(err, status, code, was_seen=pin is not None)
    for applies, kind, problem, remedy in _RULES:
        if applies(said):
            own = uri.when_changed if kind is ChangedError else uri.credentials
            found = kind(uri, f"{problem} ({said})", remedy or own)
            if isinstance(found, UnreachableError):
                found.retry_after = _retry_after(err)
                found.lasting = applies is not _is_unreachable
            if isinstance(found, CheckpointNotFoundError):
                found.lacks = "bucket" if applies is _lacks_bucket else "object"
            return found
    return CheckpointError(
        uri, str(said), "check the name, the account and the settings of the place"
    )


def no_object(uri: URI, problem: str) -> CheckpointNotFoundError:
    """Make the error that says that a place has no object of this name."""
    err = CheckpointNotFoundError(uri, problem, _CHECK_NAME)
    err.lacks = "object"
    return err


def empty_file(uri: object) -> CheckpointError:
    """Make the error that says that a file has no bytes."""
    return NotACheckpointError(uri, "the file is empty", "was its upload or download complete?")


def _status(err: Any) -> tuple[int, str]:
    """Read the HTTP status and the store's own error code out of an SDK's exception."""
    response = getattr(err, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return int(status), str(response.get("Error", {}).get("Code", ""))
    if hasattr(err, "get_http_status_code"):  # mlflow
        return err.get_http_status_code(), err.error_code
    status = getattr(err, "status_code", None) or getattr(err, "code", None)  # azure, google
    status = status or getattr(response, "status_code", None)  # requests
    code = getattr(err, "error_code", None) or getattr(response, "reason", None) or ""
    code = getattr(code, "value", code)  # Azure's are of an Enum
    return (int(status), str(code)) if isinstance(status, int) else (0, "")


def _retry_after(err: Any) -> float:
    """Read the seconds of a Retry-After header, or until its date (RFC 9110 10.2.3)."""
    response = getattr(err, "response", None)
    if isinstance(response, dict):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    else:
        headers = getattr(response, "headers", None) or {}
    text = str(headers.get("retry-after") or headers.get("Retry-After") or "")
    if text.isdecimal():
        return float(text)
    date = email.utils.parsedate_tz(text)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


def links(err: BaseException) -> Iterator[BaseException]:
    """Give an error and those that caused it: smart-open and torch wrap what others raise."""
    link: BaseException | None = err
    told: set[int] = set()  # causes may go round in a circle
    while link is not None and id(link) not in told:
        told.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


# Attributes of the SDKs' errors that hold headers and URLs, in which there are keys and tokens. A
# pickled error takes them along where its causes are pickled, too, as Dask does.
_EXCHANGES = ("request", "response", "_response")


def without_secrets(err: BaseException) -> BaseException:
    """Give the error back, or its redacted text if it or one of its causes shows a secret.

    The requests and responses that it and its causes hold are taken from them, and what gives
    access is cut out of their texts, such as the URL that urllib3's keep.
    """
    if any(redact(str(link)) != str(link) for link in links(err)):
        return RuntimeError(f"{type(err).__name__}: {redact(str(err))}")
    for link in links(err):
        for name, value in vars(link).items():
            if isinstance(value, str):
                vars(link)[name] = redact(value)
            elif name in _EXCHANGES and not isinstance(value, dict):
                vars(link)[name] = None  # botocore's, a dict, has the answer's headers alone
    return err
