"""A checkpoint in shards: an index that says which file has which tensor.

`model.safetensors.index.json`, as `huggingface_hub.save_torch_state_dict` writes it: JSON of
{"metadata": …, "weight_map": {name of a tensor: name of the file beside it that has it}}.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, BinaryIO

from attrs import evolve

from _anemoi_ckpt.errors import CorruptError, NotACheckpointError
from _anemoi_ckpt.formats import Archive, Names, read_json, storage_id, unreadable
from _anemoi_ckpt.formats.safetensors import HEADER_LIMIT, looks_like_safetensors
from _anemoi_ckpt.pickles.reading import StorageOf, Trust


def looks_like_json(start: bytes) -> bool:
    """Tell from a file's first bytes whether it is JSON's object, and no safetensors file."""
    return start.lstrip().startswith(b"{") and not looks_like_safetensors(start)


def read_weight_map(place: object, file: BinaryIO) -> dict[str, str]:
    """Read which file has which tensor.

    Raises:
        NotACheckpointError: JSON, but of something else.
        CorruptError: it makes no sense, or names a file that is not beside it.
    """
    with unreadable(place, "its JSON"):
        text = file.read(HEADER_LIMIT)
        index = read_json(text)
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise NotACheckpointError(
            place, "JSON, and no index of shards", "give the file that has the weights"
        )
    for name in found.values():
        if type(name) is not str or {"", ".", ".."} & {*name.split("/")} or ":" in name:
            raise CorruptError(place, f"{name!r:.80} is no file beside it", "do not trust it")
    return found


def join_archives(
    place: object, weight_map: Mapping[str, str], shards: Mapping[str, Archive], stride: int
) -> Archive:
    """Make one archive of several, whose bytes lie a stride apart.

    Raises:
        CorruptError: they are in different byte orders.
    """
    records = {
        f"{number}/{key}": evolve(
            record,
            name=f"{record.name} of {name}",
            header=number * stride + record.header,
            start=number * stride + record.start,
        )
        for number, (name, archive) in enumerate(shards.items())
        for key, record in archive.records.items()
    }
    first, *others = {archive.byteorder: archive.format for archive in shards.values()}.items()
    if others:
        raise CorruptError(place, "its files are in two byte orders", "write them anew")
    assemble = functools.partial(
        _joined, weight_map, {name: archive.assemble for name, archive in shards.items()}
    )
    return Archive(place, f"{first[1]}, {len(shards)} shards", records, assemble, first[0])


def _joined(
    weight_map: Mapping[str, str],
    shards: Mapping[str, Any],
    storage_of: StorageOf,
    trust: Trust,
    names: Names,
) -> dict[str, Any]:
    held = {
        name: assemble(functools.partial(_storage_of_shard, storage_of, number), trust, names)
        for number, (name, assemble) in enumerate(shards.items())
    }
    for name, shard in weight_map.items():
        if not isinstance(held[shard], Mapping) or name not in held[shard]:
            raise ValueError(f"{shard!r:.80} has no {name!r:.80}")
    return {name: held[shard][name] for name, shard in weight_map.items()}


def _storage_of_shard(storage_of: StorageOf, number: int, pid: Any) -> Any:
    if pid[0] == "module":
        return storage_of(pid)
    _, key, _ = storage_id(pid)
    return storage_of((*pid[:2], f"{number}/{key}", *pid[3:]))
