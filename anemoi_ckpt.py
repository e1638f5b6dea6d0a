"""Load a PyTorch checkpoint from anywhere, moving only the bytes that are used.

Read from top to bottom, this file is the way a checkpoint takes::

    text ──parse_uri, resolve──▶ URI ──open_stream, read_range──▶ bytes
    first + last block ──▶ archive ──▶ hollow checkpoint (every tensor on the meta device)
    hollow ──strategies──▶ the records that the result still needs
    records ──ranges, in parallel, CRC-checked──▶ tensors ──strategies──▶ result

load · look · keep · install · command line
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen

from _ckpt_archive import Archive, unreadable
from _ckpt_contents import Contents, array_records, arrays_of, find_metadata, look_into
from _ckpt_download import (
    Transfer,
    cache_entries,
    cache_folder,
    clear_cache,
    download_shared,
    download_to,
    download_to_cache,
)
from _ckpt_errors import (
    AccessDeniedError,
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptError,
    InvalidURIError,
    MismatchError,
    MissingPackageError,
    NotACheckpointError,
    UnreachableError,
    UnsafeCheckpointError,
    redact,
)
from _ckpt_fetch import Fetcher, memory
from _ckpt_hollow import Ledger, asks_for_values, build
from _ckpt_hubs import HFURI, MLflowURI
from _ckpt_inert import Inert, InertGlobal, Trust, trusted, walk
from _ckpt_install import (
    Before,
    Match,
    Report,
    check_enough,
    install,
    look,
    match,
    realign,
    variables_told,
)
from _ckpt_open import compression, read_archive, read_archive_shared
from _ckpt_places import (
    GCSURI,
    HTTPURI,
    S3URI,
    URI,
    AzureURI,
    Buffers,
    LocalURI,
    Params,
    Version,
    imported,
    links,
    open_stream,
    open_writer,
    parse_uri,
    read_range,
    read_version,
    register_scheme,
    resolve,
)
from _ckpt_ranks import joined
from _ckpt_sources import (
    RETRIES,
    Progress,
    Source,
    Transport,
    locate,
    stream_pinned,
)
from _ckpt_tables import sized
from _ckpt_write import embedded, write_safetensors, write_zip

__all__ = [
    "GCSURI",
    "HFURI",
    "HTTPURI",
    "S3URI",
    "URI",
    "AccessDeniedError",
    "AzureURI",
    "Buffers",
    "ChangedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "Contents",
    "CorruptError",
    "Inert",
    "InertGlobal",
    "InvalidURIError",
    "LocalURI",
    "MLflowURI",
    "MismatchError",
    "MissingPackageError",
    "NotACheckpointError",
    "Report",
    "UnreachableError",
    "UnsafeCheckpointError",
    "Version",
    "download",
    "load",
    "load_into",
    "main",
    "metadata",
    "open_stream",
    "open_writer",
    "parse_uri",
    "peek",
    "read_range",
    "read_version",
    "register_scheme",
    "resolve",
    "save",
]


def __dir__() -> list[str]:
    """List what is public, for completion in a shell."""
    return __all__


Strategy = Callable[[Any], Any]


# ── load ──────────────────────────────────────────────────────────────────────────────────────


def load(  # noqa: PLR0913 - by keyword
    uri: str | os.PathLike[str] | URI,
    *strategies: Strategy,
    trust: bool | Sequence[Any] = False,
    cached: bool = False,
    group: Any = None,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
    progress: Progress = None,
) -> Any:
    """Load a checkpoint, moving only the bytes that survive the strategies.

    ``load(uri, f, g)`` equals ``g(f(load(uri)))``. Tensors come on the CPU, bit for bit as
    `torch.load` gives them; each record is checked against its CRC-32. No code of the
    checkpoint runs, and none of its classes need be installed: what torch does not know to be
    safe comes as `Inert` data. Formats: torch's zip, torch's before 1.6, TorchScript (its state
    dict), safetensors; told by content. The strategies run at least twice: on a hollow
    checkpoint, whose tensors are on the meta device, to see what is needed, and on the real one.

    Args:
        uri: where it is: a path, or ``s3://``, ``gs://``, ``az://``, ``hf://``, ``https://``, ….
        strategies: pure functions from checkpoint to checkpoint, applied from left to right.
        trust: True imports and runs whatever the checkpoint names, at least twice: it can do
            all that you can, so be as sure of its author as of your own code. A list of classes
            and functions runs just these, and what they do with what they are given.
        cached: True downloads the file whole, once for this machine (see `download`), and loads
            from there: one request then tells that the object is still the same.
        group: ranks (of `torch.distributed`) that all call this alike: each reads a share, and they
            give it to each other, so that the store sends each byte once. What one of them
            meets, all raise. None is this process alone.
        retries: how often in a row a read that brought nothing is tried again: on refused and reset
            connections, silence, 408, 429 and 5xx, never on 401, 403, 404 and 412. One that
            brought something goes on from there.
        timeout: seconds without one new byte, waits included, after which the place counts as
            unreachable (180 where None); a connection is given up after a third of it. A client
            of your own keeps its own.
        transport_params: smart-open's: ``{"client": …}`` for S3, GCS and Azure,
            ``{"session": …, "headers": …}`` for HTTP.
        progress: None shows a bar in a terminal or notebook where loading takes over a second;
            True and False force and forbid it; a function is called with the bytes done and in all
            (None if the place does not tell).

    Raises:
        CheckpointError: says where, what is wrong and what to do.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/last.ckpt"
    >>> torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, path)
    >>> load(path, lambda checkpoint: checkpoint["state_dict"])
    {'w': tensor([1., 1.])}
    """
    transport = Transport(transport_params, retries, timeout, cached, group)
    return _load(uri, strategies, trusted(trust), transport, progress).checkpoint


load.takes_strategies = True  # type: ignore[attr-defined] # strategies.compose hands them over


@frozen
class _Loaded:
    """What a load gave, and what it took, in bytes."""

    checkpoint: Any
    moved: int
    stored: int


def _load(
    uri: str | os.PathLike[str] | URI,
    strategies: Sequence[Strategy],
    trust: Trust,
    transport: Transport,
    progress: Progress,
) -> _Loaded:
    for strategy in strategies:
        if not callable(strategy):
            raise TypeError(f"a strategy is a function of a checkpoint, not {strategy!r}")

    def survive(fetcher: Fetcher, origin: Source, source: Source, archive: Archive) -> _Loaded:
        checkpoint = _survivors(source, archive, strategies, trust, fetcher)
        return _Loaded(checkpoint, sum(origin.moved), origin.size)

    def alone() -> _Loaded:
        use = functools.partial(survive, Fetcher(progress))
        return read_archive(locate(uri, transport), transport, progress, use)

    if transport.group is None:
        return alone()
    with joined(transport, parse_uri(uri)) as ranks:
        if transport.cached:  # one for each machine downloads it
            return ranks.together(alone)
        use = functools.partial(survive, Fetcher(progress, ranks))
        return read_archive_shared(uri, transport, progress, ranks, use)


def _applied(place: URI, strategies: Sequence[Strategy], checkpoint: Any) -> Any:
    """Put a checkpoint through the strategies; an error of theirs says what was being loaded."""
    try:
        for strategy in strategies:
            checkpoint = strategy(checkpoint)
    except Exception as err:
        err.add_note(f"while loading {redact(str(place))}")
        raise
    return checkpoint


def _survivors(
    source: Source,
    archive: Archive,
    strategies: Sequence[Strategy],
    trust: Trust,
    fetcher: Fetcher,
) -> Any:
    """Run the strategies, fetch what their result still needs, and again until it needs nothing.

    On the first round nothing is there and the checkpoint is hollow; on the second, as a rule
    the last, all that the result needs is.
    """
    storages: dict[str, torch.UntypedStorage] = {}
    fresh: dict[str, torch.UntypedStorage] = {}
    while True:
        absent = archive.records.keys() - storages.keys()
        ledger = Ledger()
        problem = None
        try:
            result = build(archive, storages, fresh, ledger, trust)
            with ledger if absent else nullcontext():
                result = _applied(source.uri, strategies, result)
            gc.collect(1)  # what was dropped may hang in a cycle
            needed = ledger.origins() & absent
            # asked for values, and a strategy went on without; or made like a hollow one
            if absent and (ledger.asked or (not needed and _has_hollow(result))):
                needed = absent
        except Exception as err:  # noqa: BLE001 - raised below, on all ranks
            needed = absent
            if not (absent and (ledger.asked or ledger.awaited or asks_for_values(err))):
                problem = err
        needed = fetcher.agree(needed, problem)
        if not needed:
            return result
        result = None  # some of its tensors are hollow
        wanted = {key: record for key, record in archive.records.items() if key in needed}
        fresh = fetcher.fetch(source, wanted)
        storages |= fresh


def _has_hollow(result: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.is_meta for _, leaf in walk(result))


# ── look ──────────────────────────────────────────────────────────────────────────────────────


def peek(
    uri: str | os.PathLike[str] | URI,
    *,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> Contents:
    """Tell what is in a checkpoint, from its directory and its pickle: no tensor is moved.

    Takes at most five ranged reads, however large the checkpoint is, and runs none of its code
    (GCS and Azure are asked for size and version before).

    Args:
        uri: where it is.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.

    Raises:
        CheckpointError: as `load`.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/last.ckpt"
    >>> torch.save({"state_dict": {"w": torch.ones(250)}, "epoch": 3}, path)
    >>> contents = peek(path)
    >>> contents.epoch, contents.keys
    (3, {'state_dict': 1000, 'epoch': 0})
    >>> contents.tensors[0].name, contents.tensors[0].shape, contents.tensors[0].dtype
    ('w', (250,), torch.float32)
    """

    def look_in(origin: Source, _source: Source, archive: Archive) -> Contents:
        contents = look_into(archive, origin.size)
        return evolve(contents, bytes_moved=sum(origin.moved))

    transport = Transport(transport_params, retries, timeout)
    return read_archive(locate(uri, transport), transport, None, look_in)


def metadata(
    uri: str | os.PathLike[str] | URI,
    *,
    arrays: bool = False,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> Any:
    """Read the metadata that Anemoi embeds in a checkpoint, and none of its weights.

    Gives what `anemoi.utils.checkpoints.load_metadata` gives for a local file.

    Args:
        uri: where it is.
        arrays: give a pair, of the metadata and of the supporting arrays (numpy's,
            nested as the metadata's ``supporting_arrays_paths``); only their bytes are moved.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.

    Raises:
        CheckpointNotFoundError: no such object, or no metadata in it.
        CheckpointError: as `load`.
    """
    transport = Transport(transport_params, retries, timeout)
    found, data = _embedded(locate(uri, transport), transport, arrays=arrays)
    if found is None:
        raise CheckpointNotFoundError(
            uri,
            "there is no anemoi.json in it",
            "anemoi.utils.checkpoints.save_metadata writes one",
        )
    if not arrays:
        return found
    with unreadable(uri, "its supporting_arrays_paths"):
        return found, arrays_of(found.get("supporting_arrays_paths", {}), data)


def _embedded(
    place: URI, transport: Transport, *, arrays: bool
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Read Anemoi's metadata, if there is any, and the bytes of its arrays, by their paths."""

    def read(
        _origin: Source, source: Source, archive: Archive
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        found = find_metadata(archive)
        if found is None or not arrays:
            return found, {}
        with unreadable(place, "its supporting_arrays_paths"):
            records = array_records(archive, found.get("supporting_arrays_paths", {}))
        storages = Fetcher(progress=False).fetch(source, records)
        return found, {n: memory(each) if each.nbytes() else b"" for n, each in storages.items()}

    return read_archive(place, transport, None, read)


# ── keep ──────────────────────────────────────────────────────────────────────────────────────


def download(  # noqa: PLR0913 - by keyword
    uri: str | os.PathLike[str] | URI,
    to: str | os.PathLike[str] | None = None,
    *,
    sha256: str | None = None,
    resume: bool = True,
    group: Any = None,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
    progress: Progress = None,
) -> Path:
    """Copy a checkpoint to a file, whole and in parallel ranges, and give the file's path.

    The file appears when all of it is there and checked: its length, the digest that the place
    keeps (S3's checksums or single-part ETag, GCS's crc32c, Azure's Content-MD5, RFC 9530's
    Repr-Digest), and the CRC-32 of every record that torch stored. All reads are of one version
    of the object. The bytes are those that are stored: nothing is decompressed.

    Args:
        uri: where it is.
        to: the file to write, or a folder to write it into under its own name. None is a folder
            for all processes of this machine (``ANEMOI_CKPT_CACHE``, else the platform's for
            caches): one downloads, the others wait for it, and what is there is not fetched
            again for as long as the object is the same.
        sha256: what the file's SHA-256 must be, in hexadecimal digits.
        resume: go on with what a call before this one left when it was broken off, killed even,
            if the object is still the same; and leave it where this one is. False begins anew,
            and leaves nothing.
        group: ranks that all call this alike: the first one downloads, and the others get it from
            there, wherever they do not see its file.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.
        progress: as for `load`.

    Raises:
        CheckpointError: as `load`; or the file cannot be written, or is not what it should be.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"epoch": 3}, folder / "last.ckpt")
    >>> load(download(folder / "last.ckpt", folder / "copy.ckpt"))
    {'epoch': 3}
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 is 64 hexadecimal digits, not {sha256!r}")
    transport = Transport(transport_params, retries, timeout, group=group)
    return _download(to, Transfer(parse_uri(uri), transport, progress, sha256, resume))


def _download(to: str | os.PathLike[str] | None, transfer: Transfer) -> Path:
    """Bring a file to a file, a folder or the cache; of ranks, each gives its own path."""

    def own(to: str | os.PathLike[str], name: str) -> Path:
        target = Path(to).expanduser()
        return target / name if target.is_dir() or os.fspath(to).endswith(os.sep) else target

    def bring() -> tuple[Path, URI]:
        found = evolve(transfer, place=locate(transfer.place, transfer.transport))
        if to is None:
            return download_to_cache(found), found.place
        target = own(to, found.place.filename)
        download_to(target, found)
        return target, found.place

    def others(first: Path) -> Path:
        return cache_folder().joinpath(*first.parts[-2:]) if to is None else own(to, first.name)

    if transfer.transport.group is None:
        return bring()[0]
    with joined(transfer.transport, transfer.place) as ranks:
        return download_shared(bring, others, ranks, note=to is None)


def save(
    checkpoint: Any,
    uri: str | os.PathLike[str] | URI,
    *,
    metadata: str | os.PathLike[str] | URI | None = None,
    transport_params: Params = None,
) -> URI:
    """Write a checkpoint to any place, all or nothing, and give the place.

    It is streamed, in the format of `torch.save`; in safetensors' where the name ends with
    ``.safetensors``; compressed where it ends with ``.gz`` or the like. Inert objects are written
    as what they were read from: where their classes are installed,
    ``torch.load(weights_only=False)`` gives the real ones.

    Args:
        checkpoint: what `load` gave, or anything that `torch.save` takes.
        uri: where to. What is there stays until all is written.
        metadata: a checkpoint to take Anemoi's metadata and supporting arrays from, if it has
            any: they are no part of what `load` gives.
        transport_params: as for `load`.

    Raises:
        CheckpointError: the place cannot be written to, or the checkpoint not be pickled, or (as
            safetensors) it holds more than tensors by name.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/weights.ckpt"
    >>> load(save({"w": torch.ones(2)}, path))
    {'w': tensor([1., 1.])}
    """
    place = parse_uri(uri)
    extra = {}
    if metadata is not None:
        transport = Transport(transport_params)
        found, data = _embedded(locate(metadata, transport), transport, arrays=True)
        extra = embedded(found, data) if found is not None else {}
    suffix = compression(place)
    safetensors = _is_safetensors(place)
    write = write_safetensors if safetensors else functools.partial(write_zip, members=extra)
    with open_writer(place, transport_params) as stream, _unsaved(place):
        if suffix:
            wrapper = imported("smart_open.compression", place).compression_wrapper
            with wrapper(stream, "wb", compression=suffix) as packed:
                write(checkpoint, packed)
        else:
            write(checkpoint, stream)
    return place


def _is_safetensors(place: URI) -> bool:
    return place.filename.removesuffix(compression(place)).endswith(".safetensors")


@contextmanager
def _unsaved(place: URI) -> Iterator[None]:
    """Say why a checkpoint could not be written."""
    try:
        yield
    except Exception as err:
        for link in links(err):  # torch's writer hides what its stream raised
            if isinstance(link, CheckpointError | OSError):
                raise link from link.__cause__
        raise CheckpointError(
            place, f"the checkpoint cannot be written ({err!r})", "leave out what cannot"
        ) from err


# ── install ───────────────────────────────────────────────────────────────────────────────────


_IN_MEMORY = "a checkpoint in memory"


def load_into(  # noqa: PLR0913 - by keyword
    model: torch.nn.Module,
    checkpoint: str | os.PathLike[str] | URI | Mapping[str, Any],
    *strategies: Strategy,
    strict: bool = False,
    require: float = 0.0,
    optimizer: Any = None,
    scheduler: Any = None,
    trust: bool | Sequence[Any] = False,
    cached: bool = False,
    group: Any = None,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
    progress: Progress = None,
) -> Report:
    """Load a checkpoint's weights into a model, all or nothing, and report what was loaded.

    Only what fits is moved. Tensors of the model keep their dtype and device, tied ones stay
    tied; a model on the meta device gets its tensors on the CPU.

    Args:
        model: what to load into.
        checkpoint: where it is, or a checkpoint (or state dict) that was loaded before.
        strategies: as for `load`.
        strict: nothing may be missing, unexpected or of another shape.
        require: least share of the model's values that must be loaded, from 0 to 1.
        optimizer: gets its state where the checkpoint has it; a list where there are several. One
            for a model on the meta device is made afterwards: it would keep the old parameters.
        scheduler: likewise.
        trust: as for `load`.
        cached: as for `load`.
        group: as for `load`.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.
        progress: as for `load`.

    Raises:
        MismatchError: shapes differ (that no strategy left out), variables stand elsewhere (and no
            strategy aligned them), nothing fits, less than was required, or an optimizer of
            parameters on the meta device. The model is as it was.
        CheckpointError: as `load`.

    >>> model = torch.nn.Linear(2, 1)
    >>> report = load_into(model, {"weight": torch.ones(1, 2), "extra": torch.ones(3)})
    >>> report.loaded, report.missing, report.unexpected
    (('weight',), ('bias',), ('extra',))
    """
    begun = time.perf_counter()
    if not 0 <= require <= 1:
        raise ValueError(f"require is a share from 0 to 1, not {require!r}")
    receivers = {"optimizer": _several(optimizer), "scheduler": _several(scheduler)}
    held = checkpoint if isinstance(checkpoint, Mapping) else None
    place = LocalURI(_IN_MEMORY, "") if isinstance(checkpoint, Mapping) else parse_uri(checkpoint)
    before: list[Before] = []

    def begin(given: Any) -> Any:
        before[:] = [look(given)]
        return given

    def noted(strategy: Strategy) -> Strategy:
        if not hasattr(strategy, "variable_alignment"):  # strategies.align_variables tells it
            return strategy

        def note(given: Any) -> Any:
            before[:] = [realign(before[0], strategy.variable_alignment(given))]
            return strategy(given)

        return note

    def end(given: Any) -> Any:
        found = match(place.text, model, given, before[0], receivers)
        check_enough(place.text, model, found, require, strict=strict)
        return found

    # what strategies.compose has put together, one by one
    parts = [p for each in strategies for p in reversed(getattr(each, "composed", (each,)))]
    every = (begin, *map(noted, parts), end)
    if held is None:
        transport = Transport(transport_params, retries, timeout, cached, group)
        loaded = _load(place, every, trusted(trust), transport, progress)
    else:
        loaded = _Loaded(_applied(place, every, held), 0, 0)
    found: Match = loaded.checkpoint
    restored = install(model, found, receivers)
    absent = {*found.missing, *found.mismatched}
    return Report(
        place=redact(place.text),
        loaded=tuple(name for name in model.state_dict() if name not in absent),
        missing=found.missing,
        unexpected=found.unexpected,
        mismatched=found.mismatched,
        renamed=found.renamed,
        restored=restored,
        bytes_moved=loaded.moved,
        bytes_stored=loaded.stored,
        seconds=time.perf_counter() - begun,
        rest=found.rest,
        variables=variables_told(model, before[0]),
        aligned=tuple(before[0].alignment.tensors),
    )


load_into.takes_strategies = True  # type: ignore[attr-defined] # compose(f, partial(load_into, model))


def _several(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [] if given is None else [given]


# ── command line ──────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit code: 0, 1 with one line of error, or 2 for bad usage."""
    parser = argparse.ArgumentParser("anemoi-ckpt", description="Look into checkpoints, and copy.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("peek", help="tell what is in a checkpoint")
    command.add_argument("uri", metavar="URI")
    command.set_defaults(run=_run_peek)

    command = commands.add_parser("metadata", help="print the metadata that Anemoi embeds, as JSON")
    command.add_argument("uri", metavar="URI")
    command.set_defaults(run=_run_metadata)

    command = commands.add_parser("copy", help="copy a checkpoint, or what is wanted of it")
    command.add_argument("uri", metavar="URI")
    command.add_argument("to", metavar="DEST", help="a file or object; .safetensors: weights")
    command.add_argument("--weights", action="store_true", help="the state dict alone")
    command.add_argument("--include", metavar="GLOB", action="append", help="these weights alone")
    command.add_argument("--exclude", metavar="GLOB", action="append", help="not these weights")
    command.add_argument("--cast", metavar="DTYPE", help="floating-point weights to bfloat16, say")
    command.set_defaults(run=_run_copy)

    command = commands.add_parser("cache", help="list what download keeps for later, or clear it")
    command.add_argument("glob", metavar="GLOB", nargs="?", default="*", help="of these places")
    command.add_argument("--clear", action="store_true", help="remove them")
    command.set_defaults(run=_run_cache)

    given = parser.parse_args(arguments)
    try:
        sys.stdout.write(given.run(given))
    except (CheckpointError, OSError, ValueError) as err:
        sys.stderr.write(f"anemoi-ckpt: {redact(str(err))}\n")
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it for SIGINT
    return 0


def _run_peek(given: argparse.Namespace) -> str:
    return f"{peek(given.uri)}\n"


def _run_metadata(given: argparse.Namespace) -> str:
    return json.dumps(metadata(given.uri), indent=2) + "\n"


def _run_copy(given: argparse.Namespace) -> str:
    place, to = locate(given.uri, Transport()), parse_uri(given.to)
    if isinstance(to, LocalURI) and Path(to.path).is_dir():
        to = parse_uri(Path(to.path) / place.filename)
    converted = _is_safetensors(to) and not _is_safetensors(place)
    strategies = _chosen_strategies(given, weights=given.weights or converted)
    if strategies:
        save(load(place, *strategies), to, metadata=place)
    elif isinstance(to, LocalURI):
        download(place, to.path)
    else:
        with open_writer(to) as stream:
            stream_pinned(place, stream, Transport())
    return f"{redact(str(to))}\n"


def _run_cache(given: argparse.Namespace) -> str:
    entries = cache_entries(given.glob)
    if given.clear:
        entries = clear_cache(entries)
    lines = [
        f"{sized(entry.size):>8}  {entry.place}{'' if entry.file else '  (not whole)'}"
        + ("" if given.clear else f"\n{'':>8}  {entry.file or entry.folder}")
        for entry in entries
    ]
    total = sized(sum(entry.size for entry in entries))
    what = "removed" if given.clear else f"in {cache_folder()}"
    return "".join(f"{line}\n" for line in (*lines, f"{total:>8}  {what}"))


def _chosen_strategies(given: argparse.Namespace, *, weights: bool) -> list[Strategy]:
    # by its path: a user's own strategies.py in the working folder is another
    path = Path(__file__).with_name("strategies.py")
    spec: Any = importlib.util.spec_from_file_location("anemoi_ckpt_strategies", path)
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)
    chosen = [ours.weights] if weights else []
    if given.include:
        chosen.append(ours.include(*given.include))
    if given.exclude:
        chosen.append(ours.exclude(*given.exclude))
    if given.cast:
        dtype = getattr(torch, given.cast, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"--cast takes a dtype of torch, such as bfloat16, not {given.cast!r}")
        chosen.append(ours.cast(dtype))
    return chosen


if __name__ == "__main__":
    sys.exit(main())
