"""One flipped bit, anywhere: never a wrong number."""

import io
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import servers
from anemoi_ckpt import CheckpointError, CorruptError, download, load
from checkpoints import assert_same, lightning_checkpoint
from strategies import weights

FLIPS = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return lightning_checkpoint(tmp_path_factory.mktemp("integrity")).read_bytes()


def tensors(data: bytes) -> dict[str, range]:
    """Where in the file the bytes of each tensor's record are."""
    found = {}
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        if "/data/" in info.filename:
            names = struct.unpack_from("<HH", data, info.header_offset + 26)
            start = info.header_offset + 30 + sum(names)
            found[info.filename] = range(start, start + info.file_size)
    return found


def flipped(data: bytes, bit: int) -> bytes:
    wrong = bytearray(data)
    wrong[bit // 8] ^= 1 << bit % 8
    return bytes(wrong)


def same(one: Any, other: Any) -> bool:
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True


def outcome(act: Callable[[], Any], right: Any) -> str:
    """What comes: an error by its name, or what is equal; never something else."""
    try:
        loaded = act()
    except CheckpointError as err:
        return type(err).__name__
    assert same(loaded, right)
    return "equal"


def test_a_flipped_bit_in_a_tensor_is_caught(data: bytes, tmp_path: Path) -> None:
    """Where torch.load gives back the wrong number, and says nothing."""
    records = tensors(data)
    places = [byte for extent in records.values() for byte in extent]
    right = torch.load(io.BytesIO(data), weights_only=True)
    draw = random.Random(0)
    path = tmp_path / "a.ckpt"
    torchs = set()  # whether torch.load gives what is right
    for _ in range(FLIPS):
        byte = draw.choice(places)
        wrong = flipped(data, 8 * byte + draw.randrange(8))
        path.write_bytes(wrong)
        name = next(name for name, extent in records.items() if byte in extent)
        torchs.add(same(torch.load(io.BytesIO(wrong), weights_only=True), right))
        with pytest.raises(CorruptError) as caught:
            load(path)
        assert name in caught.value.problem
        with pytest.raises(CorruptError, match=name):
            download(path, tmp_path / "copy.ckpt")
        assert not (tmp_path / "copy.ckpt").exists()
    assert torchs == {False}


def test_a_flipped_bit_anywhere_is_caught_or_harmless(data: bytes, tmp_path: Path) -> None:
    right = load(io_path(tmp_path, data))
    draw = random.Random(1)
    outcomes = []
    for _ in range(FLIPS):
        outside = [0, len(data) - 20_000]  # the pickle, the directory and the gaps, as well
        begin = draw.choice(outside)
        bit = 8 * (begin + draw.randrange(20_000)) + draw.randrange(8)
        path = io_path(tmp_path, flipped(data, bit))
        outcomes.append(outcome(lambda path=path: load(path), right))
    assert set(outcomes) <= {"equal", "CorruptError", "NotACheckpointError"}
    assert outcomes.count("CorruptError") > FLIPS / 2


def io_path(folder: Path, data: bytes) -> Path:
    path = folder / "b.ckpt"
    path.write_bytes(data)
    return path


def test_bits_that_flip_on_the_way(data: bytes, http_server: servers.HTTPServer) -> None:
    """One in each answer, as long as they flip: a wrong record is fetched once more."""
    uri = http_server.put("a.ckpt", data)
    right = load(uri, weights)
    draw = random.Random(2)
    outcomes = []
    for number in range(100):
        answers = 1 + number % 4  # the first ones, of at most eight
        http_server.log.clear()
        http_server.fault = lambda request, answers=answers: (
            servers.Fault(flip=draw.randrange(8 * len(data)))
            if len(http_server.log) <= answers
            else None
        )
        outcomes.append(outcome(lambda: load(uri, weights), right))
    assert set(outcomes) <= {"equal", "CorruptError", "NotACheckpointError"}
    assert len(set(outcomes)) > 1
