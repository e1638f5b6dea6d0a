"""A place becomes an open checkpoint, in whichever format, and however it has to be read.

open · shards · compression
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from attrs import evolve, frozen

from _anemoi_ckpt.blocks import (
    BLOCK_BYTES,
    first_alone,
    first_and_last,
    in_memory,
    read_whole,
    streamed,
)
from _anemoi_ckpt.cache import download_to_cache
from _anemoi_ckpt.downloading import Transfer
from _anemoi_ckpt.errors import (
    CorruptError,
    InvalidURIError,
    MismatchError,
    MissingPackageError,
    NotACheckpointError,
)
from _anemoi_ckpt.formats import Archive, what_instead
from _anemoi_ckpt.formats.legacy import read_legacy
from _anemoi_ckpt.formats.others import what_begins
from _anemoi_ckpt.formats.safetensors import looks_like_safetensors, read_safetensors
from _anemoi_ckpt.formats.shards import join_archives, looks_like_json, read_weight_map
from _anemoi_ckpt.formats.tar import looks_like_tar, read_tar
from _anemoi_ckpt.formats.torch_zip import (
    LOCAL_SIGNATURE,
    is_packed,
    read_directory,
    read_zip,
    refuse_several,
    unpacked,
)
from _anemoi_ckpt.formats.torchscript import is_torchscript, read_torchscript
from _anemoi_ckpt.parallel import in_parallel
from _anemoi_ckpt.places import URI, UnrangedError, Version, imported, sibling
from _anemoi_ckpt.places.joined import STRIDE_BYTES, JoinedURI
from _anemoi_ckpt.places.local import LocalURI
from _anemoi_ckpt.places.memory import MemoryURI
from _anemoi_ckpt.places.streams import StreamURI
from _anemoi_ckpt.progress import Progress
from _anemoi_ckpt.ranks import Ranks, sendable
from _anemoi_ckpt.transport import Source, Transport, log
from _anemoi_ckpt.unpacking import GZIP_MARK, bounded

_CHUNK_BYTES = 1024**2  # that are unpacked at once
_SIGNATURE_BYTES = 512  # enough to tell every format, and what is none


# ── open ──────────────────────────────────────────────────────────────────────────────────────


@frozen
class Opened:
    """An open checkpoint: what is stored, where its records are read from, and what is in it."""

    origin: Source  # tells what was moved, and how large the object is
    source: Source  # the origin; or in memory, where it was decompressed or came in one piece
    archive: Archive

    @property
    def bytes_moved(self) -> int:
        """Bytes that have come from the place, so far."""
        return sum(self.origin.moved)

    @property
    def directory(self) -> tuple[Any, ...]:
        """Where the archive has its records, and their checksums, which no checksum covers."""
        return self.archive.byteorder, dict(self.archive.records), dict(self.archive.members)

    @property
    def bytes_stored(self) -> int:
        """Size of the object, or of all shards."""
        return self.origin.size


def opened(
    place: URI, transport: Transport, progress: Progress = False, *, fresh: bool = False
) -> Opened:
    """Open what a place holds: move its first and last blocks, and what else the pickle takes.

    What makes no sense is fetched anew, once: a bit may have flipped on the way.

    Args:
        place: where it is, as `locate` tells it.
        transport: how to reach it.
        progress: shown where all of it has to be moved.
        fresh: fetch copies in the cache anew.

    Raises:
        CheckpointError: it cannot be read, or is no checkpoint.
    """
    try:
        return _opened_once(place, transport, progress, fresh=fresh)
    except (CorruptError, NotACheckpointError) as err:
        if not can_differ(place, transport):
            raise
        problem = err
    log.info("fetched anew, because of what came from %s: %s", problem.place, problem.problem)
    return _opened_once(place, transport, progress)


def can_differ(place: URI, transport: Transport) -> bool:
    """Tell whether other bytes may come than before, of the same object."""
    return not (transport.cached or isinstance(place, LocalURI | MemoryURI))


def _opened_once(
    place: URI, transport: Transport, progress: Progress, *, fresh: bool = False
) -> Opened:
    def at(uri: URI) -> URI:
        if not transport.cached:
            return uri
        sha256 = transport.sha256 if uri is place else None
        copy = download_to_cache(Transfer(uri, transport, progress, sha256, fresh=fresh))
        return LocalURI(uri.text, str(copy))  # errors name the place as it was given

    first = at(place)

    def beside(name: str) -> URI:
        if isinstance(place, StreamURI):
            problem = "it is the index of a checkpoint in shards, which are in other files"
            raise InvalidURIError(place, problem, "give its path or its URL, and not the open file")
        return at(sibling(place, name))

    try:
        origin, blocks = first_and_last(first, transport)
        source = origin
    except UnrangedError:
        data = streamed(first, transport, progress)
        origin = Source(first, Version(len(data)), transport, moved=[len(data)])
        source, blocks = in_memory(first, data)
    return _opened(origin, source, blocks, progress, beside)


_T = TypeVar("_T")


def looked(
    place: URI, transport: Transport, look: Callable[[Opened], _T], progress: Progress = False
) -> _T:
    """Open what a place holds, and look at it; once more if what came for that is damaged.

    Raises:
        CheckpointError: as `opened`, and as `look`.
    """
    try:
        return look(opened(place, transport, progress))
    except CorruptError:
        if not can_differ(place, transport):
            raise
    return look(opened(place, transport, progress))


def opened_by_ranks(
    place: Callable[[], URI], transport: Transport, progress: Progress, ranks: Ranks
) -> Opened:
    """Open what a place holds on rank 0, and tell the other ranks.

    Raises:
        CheckpointError: as `opened`, on all ranks.
    """
    if ranks.rank:
        shared: Any = ranks.share()
        if isinstance(shared, Exception):
            raise shared
        origin = evolve(shared.origin, transport=transport)
        source = evolve(origin, uri=shared.source.uri, version=shared.source.version)
        return Opened(origin, source, shared.archive)
    try:
        with ranks.beating():
            found = opened(place(), transport, progress)
    except Exception as err:
        ranks.share(sendable(err))
        raise
    ranks.share(evolve(found, archive=evolve(found.archive, file=None, members={})))
    return found


def _opened(
    origin: Source,
    source: Source,
    blocks: BinaryIO,
    progress: Progress,
    beside: Callable[[str], URI],
) -> Opened:
    for named in (compression(source.uri), ""):  # it may be compressed twice, and named so once
        suffix = _packing(_signature(blocks), named)
        if not suffix:
            break
        packed = read_whole(source, progress)
        source, blocks = in_memory(source.uri, _decompressed(source.uri, packed, suffix))
    if looks_like_json(_signature(blocks)):
        return _opened_shards(origin, source.uri, blocks, beside)
    return Opened(origin, *_read_file(source, blocks, progress))


def _signature(blocks: BinaryIO) -> bytes:
    start = blocks.read(_SIGNATURE_BYTES)
    blocks.seek(0)
    return start


_SHARD = (
    "it is one process's shard of a folder that torch.distributed.checkpoint wrote",
    "make one file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch IN OUT",
)


def _read_file(source: Source, blocks: BinaryIO, progress: Progress) -> tuple[Source, Archive]:
    """Read what one file holds; give what to read its records from, too."""
    place, start = source.uri, _signature(blocks)
    if looks_like_safetensors(start):  # first: the length of its header may look like a zip's mark
        return source, read_safetensors(place, blocks, source.size)
    if start.startswith(LOCAL_SIGNATURE):
        if place.filename.endswith(".distcp"):
            raise NotACheckpointError(place, *_SHARD)
        refuse_several(place, blocks)
        directory = read_directory(place, blocks)
        if is_packed(directory):
            source, blocks = in_memory(place, unpacked(place, read_whole(source, progress)))
            directory = read_directory(place, blocks)
        read = read_torchscript if is_torchscript(directory) else read_zip
        return source, read(place, blocks, directory)
    buffered = io.BufferedReader(blocks, BLOCK_BYTES)  # type: ignore[type-var] # a raw stream, typed as BinaryIO
    if start.startswith(b"\x80"):  # a pickle's first byte
        return source, read_legacy(place, buffered, source.size)
    if looks_like_tar(start):
        return source, read_tar(place, buffered, source.size)
    raise NotACheckpointError(place, *(what_instead(start) or what_begins(start)))


# ── shards ────────────────────────────────────────────────────────────────────────────────────


def _opened_shards(
    origin: Source, place: URI, index: BinaryIO, beside: Callable[[str], URI]
) -> Opened:
    """Open the files that an index names, as one."""
    if origin.transport.sha256 is not None:
        raise MismatchError(
            place,
            "it is the index of several files, and a sha256 pins one",
            "load its shards by their own names, each with its sha256",
        )
    weight_map = read_weight_map(place, index)
    shards = {
        name: evolve(origin, uri=beside(name), version=None, beginning=(0, 0))
        for name in dict.fromkeys(weight_map.values())
    }
    tasks = [functools.partial(_opened_shard, shard) for shard in shards.values()]
    read = in_parallel(tasks, origin)
    archives = {name: archive for name, (_, archive) in zip(shards, read, strict=True)}
    joined = evolve(
        next(iter(shards.values())),
        uri=JoinedURI(origin.uri.text, tuple((source.uri, source.version) for source, _ in read)),
        version=Version(sum(source.size for source, _ in read)),
    )
    return Opened(joined, joined, join_archives(place, weight_map, archives, STRIDE_BYTES))


def _opened_shard(source: Source) -> tuple[Source, Archive]:
    """Read a shard from its first block on: that of safetensors has all that is needed."""
    try:
        source, blocks = first_alone(source)
    except UnrangedError:
        data = streamed(source.uri, source.transport, progress=False)
        source.moved.append(len(data))
        source, blocks = in_memory(source.uri, data)
    return _read_file(source, blocks, progress=False)


# ── compression ───────────────────────────────────────────────────────────────────────────────


_MARKS = {
    ".gz": GZIP_MARK,
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\0",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".lz4": b"\x04\x22\x4d\x18",
}


def _packing(start: bytes, named: str) -> str:
    """Tell from a file's first bytes how it is compressed; from its name, where they tell nothing.

    A store may keep it compressed under a name that does not say so, and a server may have
    decompressed what is named so.
    """
    if looks_like_safetensors(start) or looks_like_tar(start) or what_instead(start):
        return ""
    if start.startswith((LOCAL_SIGNATURE, b"\x80")) or looks_like_json(start):
        return ""
    marked = (suffix for suffix, mark in _MARKS.items() if start.startswith(mark))
    return next(marked, "") or named


def compression(uri: URI) -> str:
    """Give the ending of a name that smart-open knows to decompress; nothing for other names."""
    suffix = Path(uri.filename).suffix.lower()
    return suffix if suffix in {".gz", ".bz2", ".xz", ".zst", ".lz4"} else ""


def _decompressed(uri: URI, data: bytes | bytearray, suffix: str) -> bytes:
    smart_open = imported("smart_open.compression", uri)
    try:
        with smart_open.compression_wrapper(io.BytesIO(data), "rb", compression=suffix) as stream:
            read = bounded(stream.read, lambda: len(data), uri)
            return b"".join(iter(functools.partial(read, _CHUNK_BYTES), b""))
    except (CorruptError, MemoryError):
        raise
    except ImportError as err:
        raise MissingPackageError(
            uri, f"{suffix} needs a package that is not installed ({err})", "install it"
        ) from err
    except Exception as err:
        raise CorruptError(
            uri, f"it cannot be decompressed as {suffix} ({err!r})", "was its upload complete?"
        ) from err
