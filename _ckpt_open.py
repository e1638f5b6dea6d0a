"""What a place holds, in whichever of the formats, and however it has to be taken.

archive · shards · compression
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from attrs import evolve

from _ckpt_archive import (
    LOCAL_SIGNATURE,
    Archive,
    is_packed,
    join_archives,
    looks_like_json,
    looks_like_safetensors,
    read_directory,
    read_legacy,
    read_safetensors,
    read_weight_map,
    read_zip,
    unpacked,
    what_instead,
)
from _ckpt_download import Transfer, download_to_cache
from _ckpt_errors import CorruptError, MissingPackageError, NotACheckpointError
from _ckpt_places import URI, UnrangedError, Version, imported, parse_uri, sibling
from _ckpt_ranks import Ranks, sendable
from _ckpt_sources import (
    BLOCK_BYTES,
    SHARD_BYTES,
    JoinedURI,
    Progress,
    Source,
    Transport,
    hold,
    in_parallel,
    join,
    locate,
    open_first,
    open_source,
    read_whole,
    shown,
    stream_whole,
)

_T = TypeVar("_T")
_SIGNATURE_BYTES = 64  # enough to tell every format, and what is none


# ── archive ───────────────────────────────────────────────────────────────────────────────────


def read_archive(
    place: URI,
    transport: Transport,
    progress: Progress,
    use: Callable[[Source, Source, Archive], _T],
) -> _T:
    """Use what a place holds: given are what is stored, what to read from, and what is in it.

    Raises:
        CheckpointError: it cannot be had, or is no checkpoint.
    """
    copies: list[Path] = []

    def at(uri: URI) -> URI:
        if not transport.cached:
            return uri
        copies.append(download_to_cache(Transfer(uri, transport, progress)))
        return parse_uri(copies[-1])

    try:
        return _use(place, at, transport, progress, use)
    except CorruptError:
        if not copies:
            raise
        for copy in copies:  # damaged since they were downloaded
            copy.unlink(missing_ok=True)
        return _use(place, at, transport, progress, use)


def read_archive_shared(
    uri: str | os.PathLike[str] | URI,
    transport: Transport,
    progress: Progress,
    ranks: Ranks,
    use: Callable[[Source, Source, Archive], _T],
) -> _T:
    """Use what a place holds on all ranks; the first one asks, and tells the others.

    Raises:
        CheckpointError: as for `read_archive`, on all of them.
    """
    while ranks.rank:
        told: Any = ranks.share()
        if isinstance(told, Exception):
            raise told
        origin, source, archive = told
        own = evolve(origin, transport=transport)
        with suppress(UnrangedError):  # else the first rank takes it whole, and tells anew
            return use(own, evolve(own, uri=source.uri, version=source.version), archive)
    all_know = False

    def tell(origin: Source, source: Source, archive: Archive) -> _T:
        nonlocal all_know
        ranks.share((origin, source, evolve(archive, file=None, members={})))
        all_know = True
        try:
            return use(origin, source, archive)
        except UnrangedError:
            all_know = False
            raise

    try:
        return read_archive(locate(uri, transport), transport, progress, tell)
    except Exception as err:
        if not all_know:
            ranks.share(sendable(err))
        raise


def _use(
    place: URI,
    at: Callable[[URI], URI],
    transport: Transport,
    progress: Progress,
    use: Callable[[Source, Source, Archive], _T],
) -> _T:
    def used(origin: Source, source: Source, blocks: BinaryIO) -> _T:
        def shard(name: str) -> Source:
            return evolve(origin, uri=at(sibling(place, name)), version=None)

        source, archive = _open_archive(source, blocks, progress, shard)
        return use(source if isinstance(source.uri, JoinedURI) else origin, source, archive)

    first = at(place)
    try:
        origin, blocks = open_source(first, transport)
        return used(origin, origin, blocks)
    except UnrangedError:
        data = _taken_whole(first, transport, progress)
        origin = Source(first, Version(len(data)), transport, moved=[len(data)])
        return used(origin, *hold(first, data))


def _taken_whole(place: URI, transport: Transport, progress: Progress) -> memoryview:
    whole = io.BytesIO()
    with shown(place, None, progress) as notify:
        stream_whole(place, whole, transport, notify)
    return whole.getbuffer()


def _open_archive(
    source: Source, blocks: BinaryIO, progress: Progress, shard: Callable[[str], Source]
) -> tuple[Source, Archive]:
    """Read what a source holds; give what to read from, too."""
    place = source.uri
    suffix = compression(place)
    if suffix:
        source, blocks = hold(place, _decompressed(place, read_whole(source, progress), suffix))
    if looks_like_json(_signature(blocks)):
        return _open_shards(source, read_weight_map(place, blocks), shard)
    return _open_file(source, blocks, progress)


def _signature(blocks: BinaryIO) -> bytes:
    start = blocks.read(_SIGNATURE_BYTES)
    blocks.seek(0)
    return start


def _open_file(source: Source, blocks: BinaryIO, progress: Progress) -> tuple[Source, Archive]:
    place, start = source.uri, _signature(blocks)
    if looks_like_safetensors(start):  # first: the length of its header may look like a zip's mark
        return source, read_safetensors(place, blocks, source.size)
    if start.startswith(LOCAL_SIGNATURE):
        directory = read_directory(place, blocks)
        if is_packed(directory):
            source, blocks = hold(place, unpacked(place, read_whole(source, progress)))
            directory = read_directory(place, blocks)
        return source, read_zip(place, blocks, directory)
    if start.startswith(b"\x80"):  # a pickle's first byte
        buffered = io.BufferedReader(blocks, BLOCK_BYTES)  # type: ignore[type-var] # raw, and typed as what zipfile takes
        return source, read_legacy(place, buffered, source.size)
    begins = (f"it begins with {start[:16]!r}, as no checkpoint does", "give a file of torch.save")
    raise NotACheckpointError(place, *(what_instead(start) or begins))


# ── shards ────────────────────────────────────────────────────────────────────────────────────


def _open_shards(
    origin: Source, weight_map: Mapping[str, str], shard: Callable[[str], Source]
) -> tuple[Source, Archive]:
    """Read what the files hold that an index names, as one."""
    named = {name: shard(name) for name in dict.fromkeys(weight_map.values())}
    tasks = [functools.partial(_first_block, source) for source in named.values()]
    sources, archives = [], {}
    for name, opened in zip(named, in_parallel(tasks, origin), strict=True):
        source, archives[name] = _open_file(*opened, progress=False)
        sources.append(source)
    joined = join(origin.uri, sources, named[name])
    return joined, join_archives(origin.uri, weight_map, archives, SHARD_BYTES)


def _first_block(source: Source) -> tuple[Source, BinaryIO]:
    try:
        return open_first(source)
    except UnrangedError:
        data = _taken_whole(source.uri, source.transport, progress=False)
        source.moved.append(len(data))
        return hold(source.uri, data)


# ── compression ───────────────────────────────────────────────────────────────────────────────


def compression(uri: URI) -> str:
    """Give the ending of a name that smart-open knows to decompress, or nothing."""
    suffix = Path(uri.filename).suffix.lower()
    return suffix if suffix in {".gz", ".bz2", ".xz", ".zst", ".lz4"} else ""


def _decompressed(uri: URI, data: bytes | bytearray, suffix: str) -> bytes:
    smart_open = imported("smart_open.compression", uri)
    try:
        with smart_open.compression_wrapper(io.BytesIO(data), "rb", compression=suffix) as stream:
            return bytes(stream.read())
    except ImportError as err:
        raise MissingPackageError(
            uri, f"{suffix} needs a package that is not installed ({err})", "install it"
        ) from err
    except Exception as err:
        raise CorruptError(
            uri, f"it cannot be decompressed as {suffix} ({err!r})", "was its upload complete?"
        ) from err
