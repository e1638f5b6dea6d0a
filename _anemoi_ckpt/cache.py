"""The cache: files that are downloaded once for all processes of a machine."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import platformdirs
from attrs import frozen
from zlib_ng import zlib_ng

from _anemoi_ckpt.downloading import (
    Transfer,
    bring,
    local_uri,
    locked,
    pinned_version,
)
from _anemoi_ckpt.errors import UnreachableError, harmless, redact
from _anemoi_ckpt.places import URI, check_params, environment
from _anemoi_ckpt.places.azure import AzureURI
from _anemoi_ckpt.places.http import HTTPURI
from _anemoi_ckpt.places.local import LocalURI, explained_writing
from _anemoi_ckpt.places.s3 import S3URI
from _anemoi_ckpt.places.settings import AZURE, store_settings
from _anemoi_ckpt.places.streams import Place, parse_place
from _anemoi_ckpt.transport import Transport, locate, log

_SIGNING = re.compile(
    r"(?i)X-(?:Amz|Goog)-.*|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Policy|Key-Pair-Id"
    r"|delegation|.*token|.*password|api_?key"
)
_SAS = re.compile(r"s[veprst]|sig|sip|spr|srt|sdd|sk\w+|saoid|suoid|scid|ses")  # Azure's


def cache_folder() -> Path:
    """Give the folder that `ANEMOI_CKPT_CACHE` names, or one in the platform's cache folder."""
    folder = os.environ.get("ANEMOI_CKPT_CACHE")
    if folder:
        return Path(folder).expanduser()
    return platformdirs.user_cache_path("anemoi-ckpt", appauthor=False)


def located(place: Place, transport: Transport) -> URI:
    """Do as `locate`; or, for what is to be cached, as `locate_kept`."""
    if not transport.cached:
        return locate(place, transport)
    return locate_kept(Transfer(parse_place(place), transport, progress=False))


def locate_kept(transfer: Transfer) -> URI:
    """Do as `locate` for what is to be cached; offline, a copy serves by the place's own name.

    Raises:
        CheckpointError: as `locate`.
    """
    with _advised(transfer):
        if is_offline() and not transfer.fresh and _copies(transfer):
            check_params(transfer.place, transfer.transport.params)
            return transfer.place
        return locate(transfer.place, transfer.transport)


def download_to_cache(transfer: Transfer) -> Path:
    """Download a file once for all processes of this machine, while the object is the same.

    Offline, a copy that is there serves, and the place is not asked at all.
    """
    if is_offline() and not transfer.fresh and (copy := _copy(transfer)):
        place = harmless(redact(str(transfer.place)))
        log.warning("%s: offline, so the copy in the cache serves, unasked", place)
        return copy
    with _advised(transfer):
        return _download_to_cache(transfer)


@contextmanager
def _advised(transfer: Transfer) -> Iterator[None]:
    """Tell, where a place is out of reach, that a copy could serve."""
    try:
        yield
    except UnreachableError as err:
        if not transfer.fresh and _copy(transfer):
            err.remedy += f"; or set {_OFFLINE[0]}=1 to take the copy that is in the cache"
            err.name_place(err.place)
        raise


def _download_to_cache(transfer: Transfer) -> Path:
    """Ask the place which object it has, and download that unless the cache has it."""
    version = pinned_version(transfer)
    known = [version.size, version.tag] if version else None
    key = hashlib.sha256(json.dumps([_identity(transfer.place), known]).encode()).hexdigest()[:32]
    target = cache_folder() / key / (transfer.place.filename or "checkpoint")
    tagged = (
        version is not None and version.tag is not None
    )  # without a tag, it may be another object
    kept = tagged and not transfer.fresh
    if kept and _is_kept(target, transfer):
        with suppress(OSError):  # the newest serves offline
            os.utime(target.parent / _RECORD)
        return target
    note(target, redact(str(transfer.place)))
    with locked(target):
        if not (kept and _is_kept(target, transfer)):  # another process may have downloaded it
            (target.parent / _RECORD).unlink(missing_ok=True)
            bring(target, transfer, version)
            record = {"store": _store(transfer), "sum": _sum(target)}
            with explained_writing(local_uri(target)):
                (target.parent / _RECORD).write_text(json.dumps(record), "utf-8")
    return target


def note(target: Path, place: str) -> None:
    """Write, into the folder of a cached file, the place that it comes from."""
    with explained_writing(local_uri(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / _NOTE).write_text(place, "utf-8")


def _is_kept(target: Path, transfer: Transfer) -> bool:
    """Tell whether the cache has the file, with the right SHA-256 if one is required."""
    if not target.is_file():
        return False
    if transfer.sha256 is None:
        return True
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == transfer.sha256.lower()


def _identity(place: URI) -> str:
    """Give the parts of a place that identify the object: not the signature of a request."""
    if isinstance(place, LocalURI):
        return str(Path(place.path).resolve())
    url = urllib.parse.urlsplit(place.text)
    query = urllib.parse.parse_qsl(url.query, keep_blank_values=True)
    signed = "sig" in dict(query)
    kept = [
        (name, value)
        for name, value in query
        if not _SIGNING.fullmatch(name) and not (signed and _SAS.fullmatch(name))
    ]
    has_user = isinstance(place, HTTPURI) or place.is_quoted
    host = url.netloc.rpartition("@")[2] if has_user else url.netloc
    return url._replace(netloc=host, query=urllib.parse.urlencode(kept)).geturl()


# ── offline ───────────────────────────────────────────────────────────────────────────────────

_OFFLINE = ("ANEMOI_CKPT_OFFLINE", "HF_HUB_OFFLINE")
_RECORD = ".record"  # beside a cached file: which store's it is, and its checksum
_STORES = (  # which store a place is in
    *("AWS_ENDPOINT", "AWS_PROFILE", "AZURE_STORAGE_", "STORAGE_EMULATOR_HOST"),
    *("HF_ENDPOINT", "MLFLOW_TRACKING_URI"),
)
_SUM_BYTES = 1024**2


def is_offline() -> bool:
    """Tell whether the user says that stores are out of reach."""
    values = (os.environ.get(name, "").strip().lower() for name in _OFFLINE)
    return any(value in {"1", "true", "yes", "on"} for value in values)


def _store(transfer: Transfer) -> str:
    """Give what tells an object from those of the same name elsewhere, without a secret."""
    client = (transfer.transport.transport_params or {}).get("client")
    endpoint = getattr(getattr(client, "meta", None), "endpoint_url", None)
    if endpoint is None and isinstance(transfer.place, S3URI):
        endpoint = store_settings(transfer.place.bucket).endpoint_url
    if endpoint is None and isinstance(transfer.place, AzureURI):
        settings = store_settings(transfer.place.container, AZURE)
        endpoint = settings.endpoint_url or settings.account_name
    told = [_identity(transfer.place), endpoint, environment(*_STORES)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _sum(path: Path) -> list[int]:
    """Compute the size of a file and its CRC-32."""
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(_SUM_BYTES):
            crc, size = zlib_ng.crc32(chunk, crc), size + len(chunk)
    return [size, crc]


def _copy(transfer: Transfer) -> Path | None:
    """Find the newest sound copy of an object; None if there is none."""
    for target, known in _copies(transfer):
        with suppress(OSError):
            if _is_kept(target, transfer) and _sum(target) == known:
                return target
    return None


def _copies(transfer: Transfer) -> list[tuple[Path, list[int]]]:
    """List the copies of an object that can serve, if they are sound: the newest first."""
    store = _store(transfer)
    found = []
    for path in cache_folder().glob(f"*/{_RECORD}"):
        with suppress(OSError, ValueError):  # another process has cleared it, or it is torn
            record = json.loads(path.read_text("utf-8"))
            if record["store"] == store:
                found.append((path.stat().st_mtime_ns, path.parent, record["sum"]))
    name = transfer.place.filename or "checkpoint"
    return [(folder / name, known) for _, folder, known in sorted(found, reverse=True)]


# ── entries ───────────────────────────────────────────────────────────────────────────────────

_NOTE = ".place"  # beside a cached file: the place that it comes from


@frozen
class CacheEntry:
    """A folder of the cache, with a whole file or a part of one."""

    place: str
    folder: Path
    file: Path | None  # None if it is not whole
    size: int  # bytes on the disk
    offline: bool  # whether it can serve where the place is out of reach


def cache_entries(glob: str = "*") -> list[CacheEntry]:
    """List the cached files whose places a glob chooses, the largest first."""
    entries = []
    for note in cache_folder().glob(f"*/{_NOTE}"):
        with suppress(FileNotFoundError):  # another process has cleared it
            place = note.read_text("utf-8")
            files = [path for path in note.parent.iterdir() if path != note]
            whole = [path for path in files if not path.name.startswith(".")]
            size = sum(path.stat().st_blocks * 512 for path in files)
            offline = bool(whole) and (note.parent / _RECORD).is_file()
            entries.append(CacheEntry(place, note.parent, next(iter(whole), None), size, offline))
    chosen = [entry for entry in entries if fnmatch.fnmatchcase(entry.place, glob)]
    return sorted(chosen, key=lambda entry: -entry.size)


def clear_cache(entries: list[CacheEntry]) -> list[CacheEntry]:
    """Remove cached files, except those being downloaded; give the removed ones."""
    removed = []
    for entry in entries:
        locks = [filelock.FileLock(path) for path in entry.folder.glob(".*.lock")]
        try:
            for lock in locks:
                lock.acquire(blocking=False)
        except filelock.Timeout:
            continue
        else:
            shutil.rmtree(entry.folder, ignore_errors=True)
            removed.append(entry)
        finally:
            for lock in locks:
                lock.release()
    return removed
