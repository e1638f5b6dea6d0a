"""Load a PyTorch checkpoint from anywhere, moving only the bytes that are used.

Read from top to bottom, this is the way that a checkpoint takes, by rooms of `_anemoi_ckpt`::

    text ──parse_uri, resolve──▶ URI ──open_stream, read_range──▶ bytes            places, transport
    first + last block ──opened──▶ Opened                                          opening, formats
    Opened ──planned(strategies)──▶ Planned: the hollow result, and what it needs  planning, hollow
    Planned.needed ──fetched──▶ storages, CRC-checked                              fetching
    storages ──planned(strategies)──▶ result                                       loading

load · look · keep · plug in · install
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve

from _anemoi_ckpt import metadata as _metadata
from _anemoi_ckpt.cache import cache_folder, download_to_cache, locate_kept, note
from _anemoi_ckpt.calls import is_public, public
from _anemoi_ckpt.contents import Contents, look_into
from _anemoi_ckpt.differing import Difference, Side, compared, in_memory, stored
from _anemoi_ckpt.downloading import (
    Transfer,
    download_shared,
    download_to,
    local_uri,
    version_and_name,
)
from _anemoi_ckpt.editing import replace_record
from _anemoi_ckpt.errors import (
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
from _anemoi_ckpt.finding import Entries, found, is_glob
from _anemoi_ckpt.hooks import mark_loaded
from _anemoi_ckpt.installing import install
from _anemoi_ckpt.loading import checked, checked_steps, loaded, put_through
from _anemoi_ckpt.matching import Terms, matched, tracked
from _anemoi_ckpt.opening import Opened, can_differ, looked, opened
from _anemoi_ckpt.pickles.inert import Inert, InertGlobal
from _anemoi_ckpt.places import (
    CHECKPOINTS,
    URI,
    Buffers,
    Entry,
    Page,
    Params,
    Version,
    check_params,
    list_page,
    open_stream,
    open_writer,
    parse_folder,
    parse_uri,
    read_range,
    read_version,
    register_scheme,
    remove_object,
    resolve,
)
from _anemoi_ckpt.places.azure import AzureURI
from _anemoi_ckpt.places.ftp import FTPURI
from _anemoi_ckpt.places.gcs import GCSURI
from _anemoi_ckpt.places.hdfs import HDFSURI, WebHDFSURI
from _anemoi_ckpt.places.http import HTTPURI
from _anemoi_ckpt.places.huggingface import HFURI
from _anemoi_ckpt.places.local import LocalURI, explained_writing
from _anemoi_ckpt.places.mlflow import MLflowURI
from _anemoi_ckpt.places.s3 import S3URI
from _anemoi_ckpt.places.sftp import SFTPURI
from _anemoi_ckpt.places.streams import Place, StreamURI, parse_place
from _anemoi_ckpt.planning import Strategy
from _anemoi_ckpt.previewing import Plan, previewed
from _anemoi_ckpt.progress import Progress
from _anemoi_ckpt.ranks import joined
from _anemoi_ckpt.report import Report, reported
from _anemoi_ckpt.resuming import find_hook
from _anemoi_ckpt.saving import write_checkpoint
from _anemoi_ckpt.steps import Step, takes_strategies
from _anemoi_ckpt.trainers.anemoi import PlaceLoader, PlaceSource, make_callback
from _anemoi_ckpt.trainers.lightning import make_checkpoint_io
from _anemoi_ckpt.transport import RETRIES, Transport, listed, locate, open_for_writing
from _anemoi_ckpt.trees import Tree
from _anemoi_ckpt.verifying import Verified, verified

__all__ = [
    "FTPURI",
    "GCSURI",
    "HDFSURI",
    "HFURI",
    "HTTPURI",
    "S3URI",
    "SFTPURI",
    "URI",
    "AccessDeniedError",
    "AzureURI",
    "Buffers",
    "ChangedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "Contents",
    "CorruptError",
    "Difference",
    "Entries",
    "Entry",
    "Inert",
    "InertGlobal",
    "InvalidURIError",
    "LocalURI",
    "MLflowURI",
    "MismatchError",
    "MissingPackageError",
    "NotACheckpointError",
    "Page",
    "Plan",
    "Report",
    "StreamURI",
    "Tree",
    "UnreachableError",
    "UnsafeCheckpointError",
    "Verified",
    "Version",
    "WebHDFSURI",
    "checkpoint_io",
    "diff",
    "download",
    "edit_metadata",
    "find",
    "latest",
    "list_objects",
    "list_page",
    "load",
    "load_callback",
    "load_into",
    "loading_stage",
    "main",
    "metadata",
    "open_stream",
    "open_writer",
    "parse_uri",
    "peek",
    "plan",
    "read_range",
    "read_version",
    "register_scheme",
    "remove_object",
    "resolve",
    "save",
    "source_stage",
    "verify",
]


# Where `import anemoi_ckpt.strategies` looks: this module stands in for a package.
__path__ = [str(Path(__file__).with_name("_anemoi_ckpt") / "aliases")]

if TYPE_CHECKING:
    # Exported, hence `as`: a module of the stub package of setup.py, which may be installed or not.
    from anemoi_ckpt import strategies as strategies  # type: ignore[attr-defined, unused-ignore] # noqa: PLC0414

    __version__: str
else:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        """Import `strategies`, and look up `__version__`, when first asked."""
        if name == "strategies":
            return importlib.import_module("anemoi_ckpt.strategies")
        if name == "__version__":
            return importlib.metadata.version("anemoi-ckpt")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what is public, for completion in a shell."""
    return [*__all__, "__version__", "strategies"]


# ── load ──────────────────────────────────────────────────────────────────────────────────────


@takes_strategies
@public
def load(  # noqa: PLR0913 - by keyword
    uri: Place,
    *strategies: Strategy,
    trust: bool | Sequence[Any] = False,
    cached: bool = False,
    sha256: str | None = None,
    group: Any = None,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
    progress: Progress = None,
) -> Any:
    """Load a checkpoint, moving only the bytes that survive the strategies.

    ``load(uri, f, g)`` equals ``g(f(load(uri)))``. Tensors are on the CPU, bit for bit as
    `torch.load` gives them. Each record is compared with its CRC-32. No code of the checkpoint
    runs, and none of its classes need to be installed: objects of classes that torch does not know
    to be safe are loaded as `Inert` data. Formats: torch's zip, torch's format before 1.6,
    TorchScript (its state dict), safetensors, and an index of shards. The content tells the format.

    The strategies run at least twice. In the first run the checkpoint is hollow: its tensors are
    on the meta device, and have no values. It shows which tensors are needed. The last run gets the
    real tensors.

    Args:
        uri: where the checkpoint is: a path, or ``s3://``, ``gs://``, ``az://``, ``hf://``,
            ``https://``, …; or an open binary file, such as `io.BytesIO`, which is read from its
            current position on.
        strategies: pure functions from checkpoint to checkpoint, applied from left to right.
        trust: True imports and runs whatever the checkpoint names, at least twice. Such code can do
            all that you can, so trust the checkpoint's author as much as your own code. A list of
            classes and functions allows just these, with any arguments.
        cached: True downloads the whole file to this machine's cache (see `download`), and loads
            from there. If the file is in the cache, one request checks that it is still current.
        sha256: what the SHA-256 of the whole object must be, in hexadecimal digits. The whole
            object is then moved to a temporary file, or with `cached` to the cache (a local file is
            read where it is). Nothing is returned before all of it was checked. This protects
            against a forged object; a CRC-32 only shows damage. Not for an index of shards; with
            `group`, only with `cached`.
        group: a process group of `torch.distributed`, whose ranks all make the same call. Each rank
            reads a share, and the ranks exchange the shares, so that the store sends each byte
            once. If one rank has an error, all raise it. None loads in this process alone.
        retries: how many attempts in a row may bring no byte before the load fails (5 by default).
            Tried again are refused and reset connections, silence, 408, 429 and 5xx; not 401, 403,
            404 and 412. A read that broke off continues after its last byte.
        timeout: seconds without one new byte, waits included, after which the place counts as
            unreachable (180 where None). A single connection is given up after a third of that. A
            client of your own keeps its own time-outs.
        transport_params: options of the store, as smart-open names them: ``{"client": …}`` for S3,
            GCS and Azure, ``{"session": …, "headers": …}`` for HTTP.
        progress: None shows a bar in a terminal or notebook if loading takes over a second; True
            always shows it, False never. A function is called with the bytes done and the bytes in
            all (None if the place does not tell).

    Raises:
        TypeError: `uri` is no place, a strategy is not a function or returned None, an item of
            `trust` is neither a class nor a function, or the place has no such `transport_params`.
        CheckpointError: anything else; it says where, what is wrong and what to do.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/last.ckpt"
    >>> torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, path)
    >>> load(path, lambda checkpoint: checkpoint["state_dict"])
    {'w': tensor([1., 1.])}
    """
    transport = Transport(transport_params, retries, timeout, cached, group, sha256)
    check = functools.partial(checked, "load", uri, strategies, trust)
    return loaded(uri, strategies, check, transport, progress).result


# ── look ──────────────────────────────────────────────────────────────────────────────────────


@public
def peek(
    uri: Place,
    *,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> Contents:
    """Tell what is in a checkpoint, from its directory and its pickle. No tensor is moved.

    Takes at most five ranged reads, however large the checkpoint is, and runs none of its code
    (GCS and Azure are asked for size and version before). A legacy file does not tell how long its
    pickle is: each read is twice as long as the one before, up to twice the pickle in all. Each
    shard of a checkpoint takes one or two reads as a rule, five at most; many are read at once.

    Args:
        uri: where the checkpoint is.
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
    transport = Transport(transport_params, retries, timeout)
    return looked(locate(uri, transport), transport, look_into)


@takes_strategies
@public
def plan(  # noqa: PLR0913 - by keyword
    uri: Place,
    *strategies: Strategy,
    model: torch.nn.Module | None = None,
    trust: bool | Sequence[Any] = False,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> Plan:
    """Tell what a load would move, and what `load_into` would report; no tensor is moved.

    The strategies run once, on the hollow checkpoint.

    Args:
        uri: where the checkpoint is.
        strategies: as for `load`.
        model: the model that `load_into` would load into. The plan then has the report. The model
            is not modified.
        trust: as for `load`.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.

    Raises:
        TypeError: as `load`.
        CheckpointError: as `load`, or as `load_into` where there is a model.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/last.ckpt"
    >>> place = save({"w": torch.zeros(500_000), "bias": torch.ones(2)}, path)
    >>> [tensor.name for tensor in plan(path, lambda checkpoint: checkpoint["bias"]).tensors]
    ['bias']
    """
    transport = Transport(transport_params, retries, timeout)
    if not isinstance(model, torch.nn.Module | None):
        raise TypeError(f"model of plan is a module, not {type(model).__name__}")
    may_run = checked("plan", uri, strategies, trust)
    place = locate(uri, transport)
    hook = None if model is None else find_hook(model, strategies)
    terms = Terms(place.text, owned=True, hook=hook)
    look = functools.partial(
        previewed, strategies=strategies, trust=may_run, model=model, terms=terms
    )
    return looked(place, transport, look)


@takes_strategies
@public
def diff(  # noqa: PLR0913 - by keyword
    a: Place | Mapping[str, Any] | Inert | torch.nn.Module,
    b: Place | Mapping[str, Any] | Inert | torch.nn.Module,
    *strategies: Strategy,
    values: bool = False,
    trust: bool | Sequence[Any] = False,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> Difference:
    """Tell how two checkpoints differ, without moving a tensor.

    Tensors are compared by the CRC-32 and layout of their records, and all else by value. If there
    are no CRC-32s (safetensors, torch before 1.6), or tensors are laid out differently, the tensor
    is undecided, unless you ask for `values`.

    ``diff("s3://bucket/before.ckpt", "s3://bucket/after.ckpt", weights, include("encoder")).same``
    tells whether a frozen encoder stayed frozen.

    Args:
        a: the place of a checkpoint, or a checkpoint, state dict or model in memory.
        b: likewise. If one side has no tensors beside the weights, as a model, only the weights
            are compared.
        strategies: functions that both are put through. If they leave a bare state dict, as
            `weights` does, Anemoi's metadata are not compared.
        values: fetch the tensors that differ or may differ, and tell how far they are apart.
        trust: as for `load`.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`, of both sides.

    Returns:
        The differences. In a condition, they are true if anything differs or may differ.

    Raises:
        TypeError: as `load`.
        CheckpointError: as `load`.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/last.ckpt"
    >>> place = save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, path)
    >>> found = diff(path, {"weight": torch.ones(1, 2), "bias": torch.ones(1)}, values=True)
    >>> found.equal, found.changed, found.norms["bias"].max
    (('weight',), ('bias',), 1.0)
    """
    transport = Transport(transport_params, retries, timeout)
    places = [_held_or_placed(each) for each in (a, b)]
    for _, place in places:
        may_run = checked("diff", place, strategies, trust)

    def side(held: Any, place: URI) -> Side:
        if held is not None:
            return in_memory(held, type(held).__name__, strategies)
        look = functools.partial(stored, strategies=strategies, trust=may_run)
        return looked(locate(place, transport), transport, look)

    def compare() -> Difference:
        one, other = [side(*each) for each in places]  # a generator would rename a StopIteration
        return compared(one, other, values=values)

    found = compare()
    stored_ones = [place for held, place in places if held is None]
    if len(found.changed) == 1 and any(can_differ(each, transport) for each in stored_ones):
        again = compare()  # a checksum in a directory may have come with a wrong bit
        return evolve(again, bytes_moved=found.bytes_moved + again.bytes_moved)
    return found


@public
def verify(  # noqa: PLR0913 - by keyword
    uri: Place,
    *,
    values: bool = False,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
    progress: Progress = None,
) -> Verified:
    """Read a checkpoint once, and tell whether it is damaged. Nothing of it is kept.

    Every record is compared with its CRC-32, the object with the digest that its place keeps, and
    the pickle with the directory. A record that is wrong is read once more. If the file cannot be
    opened, only the digest is compared. The memory used stays below 200 MB, however large the
    object is, unless it is compressed or its server serves no ranges.

    Args:
        uri: where the checkpoint is.
        values: look for NaN and infinite values in the tensors, too.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.
        progress: as for `load`.

    Returns:
        The result. In a condition, it is true if nothing is wrong.

    Raises:
        NotACheckpointError: the object is no checkpoint.
        CheckpointError: the object cannot be read.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/last.ckpt"
    >>> place = save({"w": torch.tensor([1.0, float("nan")])}, path)
    >>> verify(path).ok, verify(path, values=True).not_finite
    (True, {'w': 1})
    """
    transport = Transport(transport_params, retries, timeout)
    return verified(locate(uri, transport), transport, values=values, progress=progress)


@public
def metadata(
    uri: Place,
    *,
    arrays: bool = False,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> Any:
    """Read the metadata that Anemoi embeds in a checkpoint, and none of its weights.

    It gives what `anemoi.utils.checkpoints.load_metadata` gives for a local file.

    Args:
        uri: where the checkpoint is.
        arrays: True gives a pair: the metadata, and the supporting arrays (numpy's, nested as the
            metadata's ``supporting_arrays_paths``). Only their bytes are moved.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.

    Raises:
        CheckpointNotFoundError: no such object, or no metadata in it.
        CheckpointError: as `load`.
    """
    transport = Transport(transport_params, retries, timeout)

    def look(checkpoint: Opened) -> Any:
        found = _metadata.read_metadata(checkpoint.archive)
        return (found, _metadata.read_arrays(checkpoint, found)) if arrays else found

    return looked(locate(uri, transport), transport, look)


@public
def list_objects(
    folder: str | os.PathLike[str] | URI,
    *,
    recursive: bool = False,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> Entries:
    """List the objects and folders in a folder: of a disk, a bucket, a host or a hub.

    Buckets are those of S3, Google Cloud and Azure. Hosts are listed by SFTP, FTP, HDFS and
    WebHDFS. Hubs are Hugging Face and MLflow; MLflow tells no times of files behind its server.

    Args:
        folder: a path or URL, such as ``s3://bucket/run/``, or a bucket.
        recursive: True lists all objects beneath the folder, and leaves folders out.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.

    Returns:
        Objects and folders in the order of their paths. In a store, a folder that does not exist
        gives an empty list; on a disk it is an error.

    Raises:
        CheckpointError: the folder or bucket cannot be listed.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> path = save({"w": torch.ones(2)}, folder + "/last.ckpt")
    >>> [entry.uri.filename for entry in list_objects(folder)]
    ['last.ckpt']
    """
    transport = Transport(transport_params, retries, timeout)
    return Entries(_listed(folder, transport, recursive=recursive))


def _listed(
    folder: str | os.PathLike[str] | URI, transport: Transport, *, recursive: bool
) -> Iterator[Entry]:
    uri = parse_folder(folder)
    check_params(uri, transport.params)
    return listed(uri, transport, recursive=recursive)


@public
def find(
    pattern: str | os.PathLike[str] | URI,
    *,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> Entries:
    """Find checkpoints by a glob: ``find("s3://bucket/run/**/*.ckpt")``.

    The store lists all objects whose paths begin with the part of the glob before its first
    wildcard, so a longer beginning is quicker.

    Args:
        pattern: a path or URL in which ``*`` stands for any characters of one name, ``?`` for one
            character (in a path; in a URL it begins a query), ``[ab]`` for one of these, and ``**``
            for any part of a path. A folder stands for all checkpoints beneath it; their names end
            as for `latest`.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.

    Returns:
        The entries, in the order of their paths: a list, which prints as a table. `load` and all
        other functions of a place take an entry, too.

    Raises:
        CheckpointError: the folder or bucket cannot be listed.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> for epoch in (1, 2):
    ...     place = save({"epoch": epoch}, f"{folder}/epoch={epoch}.ckpt")
    >>> [load(entry)["epoch"] for entry in find(f"{folder}/**/epoch=*.ckpt")]
    [1, 2]
    """
    return Entries(found(pattern, Transport(transport_params, retries, timeout)))


@public
def latest(
    folder: str | os.PathLike[str] | URI,
    *,
    key: Callable[[Entry], Any] | None = None,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> URI:
    """Tell where the newest checkpoint of a folder is.

    The names of checkpoints end with ``.ckpt``, ``.pt``, ``.pth``, ``.bin`` or ``.safetensors``.

    Args:
        folder: as for `list_objects`; or a glob, as for `find`.
        key: a function of an entry; the entry with the greatest value is the newest. None takes the
            time when the object was last written.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.

    Raises:
        CheckpointNotFoundError: there is no checkpoint in the folder.
        CheckpointError: the folder cannot be listed.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> path = save({"w": torch.ones(2)}, folder + "/last.ckpt")
    >>> latest(folder).filename
    'last.ckpt'
    """
    transport = Transport(transport_params, retries, timeout)
    if is_glob(folder):
        entries = chosen = [*found(folder, transport)]
    else:
        entries = [*_listed(folder, transport, recursive=False)]
        chosen = [
            each
            for each in entries
            if each.uri.filename.endswith(CHECKPOINTS) and not each.is_folder
        ]
    if not chosen and is_glob(folder):
        raise CheckpointNotFoundError(
            parse_uri(folder), "this glob chooses no checkpoint", "check it; find lists a folder"
        )
    if not chosen:
        names = [each.uri.filename for each in entries]
        raise CheckpointNotFoundError(
            parse_folder(folder),
            "there is no checkpoint in this folder",
            f"in it: {', '.join(names[:3])}" if names else "check the name: it is empty",
        )
    return max(reversed(chosen), key=key or _last_written).uri


def _last_written(entry: Entry) -> Any:
    if entry.modified is None:
        raise InvalidURIError(
            entry.uri,
            "this place does not tell when a file was written",
            "give a key=, such as lambda entry: entry.uri.filename",
        )
    return entry.modified


# ── keep ──────────────────────────────────────────────────────────────────────────────────────


@public
def download(  # noqa: PLR0913 - by keyword
    uri: Place,
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
        uri: where the checkpoint is.
        to: the file to write; or a folder, in which the copy gets the object's own name. A folder
            that ends with a slash is made if it does not exist. None writes to the cache, a folder
            that all processes of this machine share (``ANEMOI_CKPT_CACHE``, otherwise one in the
            platform's folder for caches). One process downloads, the others wait for it, and the
            file is not fetched again as long as the object is the same.
        sha256: what the file's SHA-256 must be, in hexadecimal digits.
        resume: True continues a download that was interrupted or killed, if the object is still the
            same; and if this call is interrupted, it leaves what the next one needs. False begins
            anew, and leaves nothing.
        group: a process group whose ranks all make the same call. The first rank downloads. Ranks
            that do not see its file get a copy from it.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.
        progress: as for `load`.

    Raises:
        CheckpointError: as `load`; or the file cannot be written, or does not match a digest.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"epoch": 3}, folder / "last.ckpt")
    >>> load(download(folder / "last.ckpt", folder / "copy.ckpt"))
    {'epoch': 3}
    """
    target = None if to is None else parse_uri(to)
    if not isinstance(target, LocalURI | None):
        raise ValueError(  # noqa: TRY004 - of the right type
            f"to is a file or folder of this machine, not {redact(target.text)!r}:"
            " save(load(uri), to) and `anemoi-ckpt copy` write elsewhere"
        )
    transport = Transport(transport_params, retries, timeout, group=group)
    path = target.path if target else None
    return _download(path, Transfer(parse_place(uri), transport, progress, sha256, resume))


def _download(to: str | None, transfer: Transfer) -> Path:
    """Bring a file to a file, a folder or the cache; of ranks, each gives its own path."""

    def own(to: str, name: str) -> Path:
        return Path(to) / name if is_folder(to) else Path(to)

    def is_folder(to: str) -> bool:
        return Path(to).is_dir() or to.endswith(os.sep)

    def bring() -> tuple[Path, URI]:
        if to is None:
            located = evolve(transfer, place=locate_kept(transfer))
            return download_to_cache(located), located.place
        located = evolve(transfer, place=locate(transfer.place, transfer.transport))
        asked = functools.cache(functools.partial(version_and_name, located))
        target = own(to, _name_of(located.place, asked) if is_folder(to) else "")
        if to.endswith(os.sep):
            with explained_writing(local_uri(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
        download_to(target, located, lambda: asked()[0])
        return target, located.place

    def others(first: Path) -> Path:
        return cache_folder().joinpath(*first.parts[-2:]) if to is None else own(to, first.name)

    if transfer.transport.group is None:
        return bring()[0]
    with joined(
        transfer.transport, transfer.place, f"to={'a file' if to else 'the cache'}"
    ) as ranks:
        return download_shared(bring, others, ranks, note if to is None else _prepare_nothing)


def _name_of(place: URI, ask: Callable[[], tuple[Version | None, str | None]]) -> str:
    """Name a copy as the place does: a server is asked where the URL ends with no file's name."""
    name = place.filename
    if isinstance(place, HTTPURI) and not Path(name).suffix:
        return ask()[1] or name
    return name


def _prepare_nothing(_target: Path, _place: str) -> None:
    """Write a file of the user's own: nothing is noted beside it."""


@public
def save(  # noqa: PLR0913 - by keyword
    checkpoint: Any,
    uri: str | os.PathLike[str] | URI,
    *,
    metadata: str | os.PathLike[str] | URI | Mapping[str, Any] | tuple[Any, Any] | None = None,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> URI:
    """Write a checkpoint to any place, all or nothing, and give the place.

    The format is that of `torch.save`, or safetensors if the name ends with ``.safetensors``. A
    name that ends with ``.gz`` or the like is compressed. The checkpoint is streamed. A view is
    written without the rest of its storage, if nothing else in the checkpoint shares that. Inert
    objects are written as the objects that they were read from: where their classes are installed,
    ``torch.load(weights_only=False)`` gives the real ones.

    Args:
        checkpoint: what `load` gave, or anything that `torch.save` takes.
        uri: where to write it. An object that is there stays until all is written.
        metadata: Anemoi's metadata to embed, which are no part of what `load` gives: a dict; or the
            pair of metadata and supporting arrays that ``metadata(…, arrays=True)`` gives; or the
            place of a checkpoint that has both. If `align_variables` gave `checkpoint` other
            variables, the metadata list these.
        retries: as for `load`, for each request: only a part that failed is sent again.
        timeout: as for `load`, likewise.
        transport_params: as for `load`.

    Raises:
        TypeError: `checkpoint` is a place, or a function of this module.
        CheckpointError: the place cannot be written to, the checkpoint cannot be pickled, or (as
            safetensors) it is not a dict of tensors.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/weights.ckpt"
    >>> load(save({"w": torch.ones(2)}, path))
    {'w': tensor([1., 1.])}
    """
    is_text = isinstance(checkpoint, str) and isinstance(uri, str | os.PathLike | URI)
    names_one = not is_text or "://" in checkpoint or os.path.isfile(checkpoint)  # noqa: PTH113 - a text may be too long for a path
    if isinstance(checkpoint, str | os.PathLike | URI) and names_one:
        raise TypeError(
            "save takes the checkpoint first, then where to write it: save(load(place), uri), or"
            " `anemoi-ckpt copy`, writes what is at another place"
        )
    if is_public(checkpoint):
        raise TypeError(f"save takes the checkpoint first, and {checkpoint.__name__} is none")
    place = parse_uri(uri)
    check_params(place, transport_params, writing=True)
    transport = Transport(transport_params, retries, timeout)
    members = _members(checkpoint, metadata, transport)
    write_checkpoint(checkpoint, place, members, transport)
    return place


def _members(checkpoint: Any, metadata: Any, transport: Transport) -> dict[str, Any]:
    """Make the records of Anemoi's metadata: those given, or a checkpoint's, if it has any."""
    if metadata is None:
        return {}
    if isinstance(metadata, Mapping | tuple):
        given, arrays = metadata if isinstance(metadata, tuple) else (metadata, {})
        return _metadata.embedded_new(given, arrays)
    uri = parse_uri(metadata)
    read = _read_params(uri, transport.transport_params)
    transport = evolve(transport, transport_params=read)

    def look(source: Opened) -> dict[str, Any]:
        found = _metadata.find_metadata(source.archive)
        if found is None:
            return {}
        arrays = _metadata.read_array_bytes(source, found)
        return _metadata.embedded(_metadata.brought_up_to_date(found, checkpoint), arrays)

    return looked(locate(uri, transport), transport, look)


def _read_params(uri: URI, params: Params) -> dict[str, Any]:
    return {k: v for k, v in (params or {}).items() if k not in uri.writer_params}


@public
def edit_metadata(
    uri: str | os.PathLike[str] | URI,
    function: Callable[[dict[str, Any]], Mapping[str, Any]],
    *,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
) -> URI:
    """Change the metadata that Anemoi embeds in a checkpoint, all or nothing; give the place.

    For a file, only metadata and directory are written: the new file shares the weights with the
    old one where the file system can (Btrfs, XFS); elsewhere the system copies them. An object in
    a store is downloaded, and written whole.

    Args:
        uri: where the checkpoint is.
        function: takes the metadata and returns the new ones. It may change its argument.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`, for writing, too.

    Raises:
        CheckpointNotFoundError: no such object, or no metadata in it: `save` embeds some.
        TypeError: `function` is not a function, or does not return a dict.
        CheckpointError: as `load`; or the place cannot be written to.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/last.ckpt"
    >>> place = save({"w": torch.ones(2)}, path, metadata={"run_id": "abc"})
    >>> place = edit_metadata(path, lambda metadata: metadata | {"run_id": "xyz"})
    >>> metadata(path)["run_id"], load(path)
    ('xyz', {'w': tensor([1., 1.])})
    """
    place = parse_uri(uri)
    if not callable(function):
        raise TypeError(f"edit_metadata takes a function of the metadata, not {function!r:.60}")
    check_params(place, transport_params, writing=True)
    read = _read_params(place, transport_params)
    if isinstance(place, LocalURI):
        _edit(place, function)
        return place
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"retries": retries, "timeout": timeout}
        path = download(place, Path(folder) / place.filename, transport_params=read, **options)
        _edit(LocalURI(str(path), str(path)), function)
        transport = Transport(transport_params, retries, timeout)
        with path.open("rb") as source, open_for_writing(place, transport) as stream:
            shutil.copyfileobj(source, stream)
    return place


def _edit(place: LocalURI, function: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    archive = opened(place, Transport()).archive
    changed = function(_metadata.read_metadata(archive))
    if not isinstance(changed, Mapping):
        raise TypeError(f"the function gave {type(changed).__name__}, not metadata: return a dict")
    replace_record(place, _metadata.metadata_name(archive), _metadata.as_json(changed))


# ── plug in ───────────────────────────────────────────────────────────────────────────────────

Recipe = Callable[..., Strategy]  # a function of a model


@takes_strategies
@public
def checkpoint_io(
    *strategies: Strategy,
    transport_params: Params = None,
    retries: int = RETRIES,
    timeout: float | None = None,
    **options: Any,
) -> Any:
    """Make a plug-in that lets Lightning's Trainer read and write its checkpoints at any place.

    ``trainer = Trainer(plugins=[checkpoint_io()])`` resumes with
    ``trainer.fit(model, ckpt_path="s3://…")``, and writes where
    ``ModelCheckpoint(dirpath="s3://…")`` and ``trainer.save_checkpoint("gs://…")`` say, all or
    nothing. Make the plug-in before the ModelCheckpoint, which asks fsspec what is in the store. If
    fsspec has no package for the store, the plug-in answers; of several in one process, the last.

    Args:
        strategies: functions that a checkpoint is put through when it is read.
        transport_params: as for `load`, for writing, too.
        retries: as for `load`, for writing and removing, too.
        timeout: as for `load`, likewise.
        options: other keywords of `load`, such as `trust` and `cached`.

    Raises:
        TypeError: a strategy is not a function, or `load` has no such option.
        MissingPackageError: Lightning is not installed.
    """
    transport = Transport(transport_params, retries, timeout)
    options |= {"transport_params": transport_params, "retries": retries, "timeout": timeout}
    inspect.signature(load).bind("", **options)  # a typing error is told now
    checked_steps("checkpoint_io", strategies, options.get("trust", False))
    return make_checkpoint_io(functools.partial(_load, strategies, options), transport)


def _load(strategies: Sequence[Strategy], options: Mapping[str, Any], uri: Any) -> Any:
    return load(uri, *strategies, **options)


@takes_strategies
@public
def load_callback(
    uri: str | os.PathLike[str] | URI,
    *strategies: Strategy,
    recipe: Recipe | Sequence[Recipe] = (),
    **options: Any,
) -> Any:
    """Make a callback for Lightning that loads into the model before training starts.

    ``Trainer(callbacks=[load_callback(uri, recipe=transfer_learning)])``; to a model of other
    variables, ``recipe=[align_variables, transfer_learning]``. In a configuration of
    anemoi-training it stands under ``diagnostics.callbacks``, with
    ``_target_: anemoi_ckpt.load_callback`` and
    ``recipe: {_target_: strategies.transfer_learning, _partial_: true}``.

    The callback logs what was loaded. The weights are then in the order of the model's variables,
    and Anemoi's own check of the data's variables compares with these. The callback does not set
    ``_ckpt_model_name_to_index``, which Anemoi sets from ``data_indices`` when a run is resumed.

    If a run is resumed, it continues with its own weights, which Lightning loads after these.

    Args:
        uri: where the checkpoint is.
        strategies: functions that the checkpoint is put through.
        recipe: a function of the model that gives a strategy, such as `transfer_learning`; or
            several, applied from left to right after `strategies`.
        options: other keywords of `load_into`.

    Raises:
        TypeError: a strategy is not a function, or `load_into` has no such option.
        MissingPackageError: Lightning is not installed.
    """
    return make_callback(_filling("load_callback", uri, strategies, {"recipe": recipe, **options}))


@takes_strategies
@public
def source_stage(uri: str | os.PathLike[str] | URI, *strategies: Strategy, **options: Any) -> Any:
    """Make a stage that loads a checkpoint, for the checkpoint pipeline of anemoi-training.

    Args:
        uri: where the checkpoint is.
        strategies: functions that the checkpoint is put through.
        options: other keywords of `load`. Anemoi's own loaders need ``trust=True`` if they use
            objects of the checkpoint.

    Raises:
        TypeError: a strategy is not a function, or `load` has no such option.
    """
    inspect.signature(load).bind(uri, **options)  # a typing error is told now
    checked("source_stage", uri, strategies, options.get("trust", False))
    return PlaceSource(functools.partial(_load, strategies, options, uri))


@takes_strategies
@public
def loading_stage(uri: str | os.PathLike[str] | URI, *strategies: Strategy, **options: Any) -> Any:
    """Make a stage that loads into the model, for the checkpoint pipeline of anemoi-training.

    It loads the checkpoint by itself, so it needs no source stage before it.

    Args:
        uri: as for `load_callback`.
        strategies: as for `load_callback`.
        options: other keywords of `load_callback`, above all `recipe`.

    Raises:
        TypeError: as for `load_callback`.
    """
    return PlaceLoader(_filling("loading_stage", uri, strategies, options))


def _filling(
    caller: str, uri: Any, strategies: Sequence[Strategy], options: Mapping[str, Any]
) -> Callable[[torch.nn.Module], Report]:
    """Check the arguments of a later `load_into` and its `recipe`, and give what does it."""
    options = dict(options)
    recipe: Recipe | Sequence[Recipe] = options.pop("recipe", ())
    inspect.signature(load_into).bind(None, uri, **options)  # a typing error is told now
    checked(caller, uri, strategies, options.get("trust", False))
    several = isinstance(recipe, Sequence) and not isinstance(recipe, str)
    recipes: tuple[Any, ...] = tuple(recipe) if several else (recipe,)  # type: ignore[arg-type] # as several says
    for each in recipes:
        if isinstance(each, Step):
            raise TypeError(
                f"{caller}: recipe is a function of the model, and {each!r} one of a checkpoint:"
                " give it beside the place, or its name without the call"
            )
        if not callable(each):
            raise TypeError(f"{caller}: recipe is a function of the model, not {each!r}")
    return functools.partial(_fill, uri, strategies, recipes, options)


def _fill(
    uri: Any,
    strategies: Sequence[Strategy],
    recipes: Sequence[Recipe],
    options: Mapping[str, Any],
    model: torch.nn.Module,
) -> Report:
    made = [each(model=model) if _by_name(each) else each(model) for each in recipes]
    return load_into(model, uri, *strategies, *made, **options)


def _by_name(recipe: Recipe) -> bool:
    """Tell whether a recipe has a parameter `model`, which need not be its first."""
    with suppress(ValueError):  # some functions in C tell nothing of their parameters
        model = inspect.signature(recipe).parameters.get("model")
        return model is not None and model.kind in {model.KEYWORD_ONLY, model.POSITIONAL_OR_KEYWORD}
    return False


# ── install ───────────────────────────────────────────────────────────────────────────────────


_IN_MEMORY = "a checkpoint in memory"


@takes_strategies
@public
def load_into(  # noqa: PLR0913 - by keyword
    model: torch.nn.Module,
    checkpoint: Place | Mapping[str, Any] | Inert | torch.nn.Module,
    *strategies: Strategy,
    strict: bool = False,
    require: float = 0.0,
    optimizer: Any = None,
    scheduler: Any = None,
    trust: bool | Sequence[Any] = False,
    cached: bool = False,
    sha256: str | None = None,
    group: Any = None,
    retries: int = RETRIES,
    timeout: float | None = None,
    transport_params: Params = None,
    progress: Progress = None,
) -> Report:
    """Load a checkpoint's weights into a model, all or nothing, and report what was loaded.

    The model is filled by its own `load_state_dict`, so hooks and modules that rename or resize
    weights work as usual. Only the weights that fit are moved; but below a module with hooks, or
    with its own way of loading, all weights that the checkpoint has there. Tensors of the model
    keep their dtype and device, and tied ones stay tied. A model on the meta device gets its
    tensors on the CPU.

    If a strategy continues a run (`keep_progress`, and `warm_start`, which contains it), the
    model's own `on_load_checkpoint` is called before the weights are loaded, as Lightning calls it.
    It gets a copy of the checkpoint that the strategies gave, with the states of the optimizers and
    schedulers that you pass. The weights that it leaves under ``state_dict`` are loaded.

    Args:
        model: the model to load into.
        checkpoint: the place of a checkpoint, or a checkpoint, state dict or module in memory.
        strategies: as for `load`.
        strict: True allows nothing missing, unexpected or of another shape.
        require: the least share of the model's values that must be loaded, from 0 to 1.
        optimizer: gets its state if the checkpoint has it; or a list of several. If the model is on
            the meta device, make the optimizer after the load: it would keep the old parameters.
        scheduler: likewise.
        trust: as for `load`.
        cached: as for `load`.
        sha256: as for `load`; only for a place.
        group: as for `load`.
        retries: as for `load`.
        timeout: as for `load`.
        transport_params: as for `load`.
        progress: as for `load`.

    Raises:
        MismatchError: shapes differ (that no strategy left out), variables stand elsewhere (and no
            strategy aligned them), nothing fits, less than was required, the model or an
            optimizer refuses, or an optimizer has parameters on the meta device. Where a method or
            hook of the model's own refused by a built-in error, it is of that kind, too.
        TypeError: `model` is not a module; or as `load`.
        CheckpointError: as `load`.
        Exception: an error of a class of the user's own that these raise, and whatever
            `on_load_checkpoint` raises, as it is.

    Whatever is raised, the model is then as it was, and so are those of the other ranks.

    >>> model = torch.nn.Linear(2, 1)
    >>> report = load_into(model, {"weight": torch.ones(1, 2), "extra": torch.ones(3)})
    >>> report.loaded, report.missing, report.unexpected
    (('weight',), ('bias',), ('extra',))
    """
    begun = time.perf_counter()
    if group is None:
        _check_model(model)
    held, place = _held_or_placed(checkpoint)
    receivers = {"optimizer": _several(optimizer), "scheduler": _several(scheduler)}

    def check() -> Any:  # by all ranks together, where there are some
        _check_model(model)
        _check_receivers(receivers)
        if held is not None and sha256 is not None:
            raise ValueError(f"sha256 is that of a file, and the checkpoint is {_IN_MEMORY}")
        return checked("load_into", place, strategies, trust)

    hook = find_hook(model, strategies)
    terms = Terms(place.text, strict, require, owned=held is None, hook=hook)
    match_model = functools.partial(matched, terms, model, receivers)
    steps: list[Strategy] = [*tracked(strategies), match_model]
    transport = Transport(transport_params, retries, timeout, cached, group, sha256)
    if held is None:
        found = loaded(place, steps, check, transport, progress)
    else:
        found = put_through(held, place, steps, check, transport)
    put = functools.partial(install, model, found.result, receivers, terms)
    if group is None:
        match = put()
    else:
        with joined(transport, place, "into a model") as ranks:
            match = put(ranks)
    mark_loaded(model)
    found = evolve(found, result=match)
    return reported(place.text, model, found, time.perf_counter() - begun)


def _held_or_placed(checkpoint: Any) -> tuple[Any, URI]:
    """Give a checkpoint in memory (None for one elsewhere), and its place."""
    if isinstance(checkpoint, Mapping | Inert | torch.nn.Module):
        return checkpoint, LocalURI(_IN_MEMORY, "")
    return None, parse_place(checkpoint)


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            "load_into takes the model first, then the checkpoint:"
            f" {type(model).__name__} is not a model"
        )


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


def _check_receivers(receivers: Mapping[str, Sequence[Any]]) -> None:
    for name, several in receivers.items():
        for each in several:
            if isinstance(each, type) or not hasattr(each, "load_state_dict"):
                raise TypeError(f"{name} of load_into has a load_state_dict, unlike {each!r:.60}")


# ── command line ──────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit code: 0, 1 with one line of error, or 2 for bad usage."""
    from _anemoi_ckpt import cli  # noqa: PLC0415 - it imports this module

    return cli.main(arguments)


# Users import all that is public from here: errors, pickles and `repr` say so.
for _name in __all__:
    globals()[_name].__module__ = "anemoi_ckpt"


if __name__ == "__main__":
    sys.exit(main())
