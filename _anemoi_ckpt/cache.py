"""The cache: files that are downloaded once for all processes of a machine."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import urllib.parse
from contextlib import suppress
from pathlib import Path

import filelock
import platformdirs
from attrs import frozen

from _anemoi_ckpt.downloading import (
    Transfer,
    bring,
    local_uri,
    locked,
    pinned_version,
)
from _anemoi_ckpt.errors import redact
from _anemoi_ckpt.places import URI
from _anemoi_ckpt.places.http import HTTPURI
from _anemoi_ckpt.places.local import LocalURI, explained_writing

_SIGNING = re.compile(
    r"(?i)X-(?:Amz|Goog)-.*|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Policy|Key-Pair-Id"
    r"|.*token|.*password|api_?key"
)
_SAS = re.compile(r"s[veprst]|sig|sip|spr|srt|sdd|sk\w+|saoid|suoid|scid|ses")  # Azure's


def cache_folder() -> Path:
    """Give the folder that `ANEMOI_CKPT_CACHE` names, or one in the platform's cache folder."""
    folder = os.environ.get("ANEMOI_CKPT_CACHE")
    if folder:
        return Path(folder).expanduser()
    return platformdirs.user_cache_path("anemoi-ckpt", appauthor=False)


def download_to_cache(transfer: Transfer) -> Path:
    """Download a file once for all processes of this machine, while the object is the same."""
    version = pinned_version(transfer)
    known = [version.size, version.tag] if version else None
    key = hashlib.sha256(json.dumps([_identity(transfer.place), known]).encode()).hexdigest()[:32]
    target = cache_folder() / key / (transfer.place.filename or "checkpoint")
    tagged = (
        version is not None and version.tag is not None
    )  # without a tag, it may be another object
    kept = tagged and not transfer.fresh
    if kept and _is_kept(target, transfer):
        return target
    note(target, redact(str(transfer.place)))
    with locked(target):
        if not (kept and _is_kept(target, transfer)):  # another process may have downloaded it
            bring(target, transfer, version)
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
    host = url.netloc.rpartition("@")[2] if isinstance(place, HTTPURI) else url.netloc
    return url._replace(netloc=host, query=urllib.parse.urlencode(kept)).geturl()


_NOTE = ".place"  # beside a cached file: the place that it comes from


@frozen
class CacheEntry:
    """A folder of the cache, with a whole file or a part of one."""

    place: str
    folder: Path
    file: Path | None  # None if it is not whole
    size: int  # bytes on the disk


def cache_entries(glob: str = "*") -> list[CacheEntry]:
    """List the cached files whose places a glob chooses, the largest first."""
    entries = []
    for note in cache_folder().glob(f"*/{_NOTE}"):
        with suppress(FileNotFoundError):  # another process has cleared it
            place = note.read_text("utf-8")
            files = [path for path in note.parent.iterdir() if path != note]
            whole = [path for path in files if not path.name.startswith(".")]
            size = sum(path.stat().st_blocks * 512 for path in files)
            entries.append(CacheEntry(place, note.parent, next(iter(whole), None), size))
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
