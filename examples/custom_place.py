"""Read a checkpoint in a tar archive by ranges: a place of one's own. Needs no extra.

python examples/custom_place.py
"""

import tarfile
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from attrs import frozen

from anemoi_ckpt import (
    URI,
    Buffers,
    ChangedError,
    CheckpointNotFoundError,
    LocalURI,
    Version,
    load,
    open_stream,
    read_range,
    register_scheme,
)


@frozen
class TarURI(URI):
    """``tar:///path/to/archive.tar!name/in/archive``."""

    archive: str
    name: str

    path_field = "name"  # which field ends with the file's name


def parse(text: str) -> TarURI:
    """Take a text apart."""
    archive, _, name = text.removeprefix("tar://").partition("!")
    return TarURI(text, archive, name)


def find(uri: TarURI) -> tuple[int, int]:
    """Tell where in the archive a file begins, and how long it is, in bytes."""
    try:
        with tarfile.open(uri.archive, "r:") as archive:
            member = archive.getmember(uri.name)
    except KeyError:
        raise CheckpointNotFoundError(uri, "the archive has no such file", "check it") from None
    return member.offset_data, member.size


@open_stream.register
def open_tar(uri: TarURI, transport_params: Any = None) -> BinaryIO:
    """Open it from its first byte on: the one handler that a new place must have."""
    file = tarfile.open(uri.archive, "r:").extractfile(uri.name)
    assert file is not None
    return file


@read_range.register
def read_tar_range(
    uri: TarURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Any = None,
) -> Version:
    """Read a part of it (without this, it would be read by seeking in the stream)."""
    begin, size = find(uri)
    start = begin + (max(0, size + offset) if offset < 0 else offset)
    end = min(start + buffers.size - buffers.filled, begin + size)
    part = bytearray(max(0, end - start))
    archive = LocalURI(uri.text, uri.archive)
    version = Version(size, read_range(archive, start, Buffers(part)).tag)
    if pin is not None and version != pin:
        raise ChangedError(uri, "the archive was replaced while it was read", "load it again")
    buffers.write(part)
    return version


register_scheme("tar", parse)


def main() -> None:
    """Do it, and say what happened."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        torch.save({"state_dict": {"w": torch.arange(3.0)}, "epoch": 3}, path)
        with tarfile.open(f"{folder}/run.tar", "w") as archive:
            archive.add(path, "run/last.ckpt")
        print(load(f"tar://{folder}/run.tar!run/last.ckpt"))
        try:
            load(f"tar://{folder}/run.tar!run/first.ckpt")
        except CheckpointNotFoundError as err:
            print(err.problem)


if __name__ == "__main__":
    main()
