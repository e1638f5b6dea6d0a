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
from anemoi_ckpt import (
    CheckpointError,
    CorruptError,
    NotACheckpointError,
    diff,
    download,
    load,
    metadata,
    peek,
    plan,
    save,
    verify,
)
from checkpoints import as_bytes, assert_same, lightning_checkpoint
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
    assert outcomes.count("equal") > 50  # few flip in the same record twice


# ── what comes with the first and the last block ──────────────────────────────────────────────

BLOCK_BYTES = 64 * 1024
LARGE = {"w": torch.rand(50_000), "v": torch.arange(40_000), "epoch": 3}  # more than two blocks
SERVED = as_bytes(LARGE)
# the pickle with its local headers, and the directory; what is between them is of tensors
ENDS = [
    *range(SERVED.index(b"PK\3\4", 100) + 100),
    *range(SERVED.index(b"PK\1\2"), len(SERVED)),
]


def flips_in(server: servers.HTTPServer, byte: int, bit: int, *, once: bool) -> None:
    """Have a bit of the first or the last block wrong, in the first answer with it or in all."""
    left = [1]
    in_first = byte < BLOCK_BYTES
    asked = "bytes=0-65535" if in_first else "bytes=-65536"
    offset = byte if in_first else byte - (len(SERVED) - BLOCK_BYTES)

    def spoil(request: servers.Request) -> servers.Fault | None:
        if request.range != asked or not left[0]:
            return None
        left[0] -= once
        return servers.Fault(flip=8 * offset + bit)

    server.fault = spoil


def what_is_seen(uri: str) -> Any:
    contents = peek(uri)
    return contents.keys, [(each.name, each.shape, each.dtype) for each in contents.tensors]


@pytest.mark.parametrize("seed", range(4))
def test_a_bit_of_the_ends_that_flips_on_the_way(
    seed: int, http_server: servers.HTTPServer
) -> None:
    chosen = random.Random(seed)
    uri = http_server.put("a.ckpt", SERVED)
    seen = what_is_seen(uri)
    for byte in chosen.sample(ENDS, 60):
        for look, right in ((load, LARGE), (what_is_seen, seen)):
            http_server.reset()
            flips_in(http_server, byte, chosen.randrange(8), once=True)
            assert_same(look(uri), right)


@pytest.mark.parametrize("seed", range(2))
def test_a_bit_of_the_ends_that_is_always_wrong(seed: int, http_server: servers.HTTPServer) -> None:
    chosen = random.Random(seed)
    uri = http_server.put("a.ckpt", SERVED)
    outcomes = set()
    for byte in chosen.sample(ENDS, 60):
        http_server.reset()
        flips_in(http_server, byte, chosen.randrange(8), once=False)
        try:
            found = load(uri)
        except (CorruptError, NotACheckpointError) as err:
            assert str(err).startswith(f"{uri}: ")  # noqa: PT017 - or none is raised
            outcomes.add("told")
        else:
            assert_same(found, LARGE)  # a date, say
            outcomes.add("harmless")
        assert len(http_server.log) < 20
    assert outcomes == {"told", "harmless"}


QUESTIONS: dict[str, Callable[[str], Any]] = {
    "plan": lambda uri: plan(uri).as_dict()["tensors"],
    "diff": lambda uri: diff(uri, LARGE).same,
    "verify": lambda uri: verify(uri).damaged,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_bit_that_flips_on_the_way_to_an_answer(
    question: str, http_server: servers.HTTPServer
) -> None:
    chosen = random.Random(question)
    uri = http_server.put("a.ckpt", SERVED)
    right = QUESTIONS[question](uri)
    for byte in chosen.sample(ENDS, 20):
        http_server.reset()
        flips_in(http_server, byte, chosen.randrange(8), once=True)
        assert QUESTIONS[question](uri) == right


def test_a_checksum_that_flips_on_the_way_to_verify(http_server: servers.HTTPServer) -> None:
    name = SERVED.rindex(b"archive/data/0")  # in the directory, whose CRC-32 is 30 bytes before
    uri = http_server.put("a.ckpt", SERVED)
    flips_in(http_server, name - 30, 0, once=True)
    found = verify(uri)
    assert found.ok
    assert found.bytes_moved > 2 * len(SERVED)
    http_server.reset()
    flips_in(http_server, name - 30, 0, once=False)
    (damage,) = verify(uri).damaged
    assert "archive/data/0" in damage


def test_a_checksum_that_flips_on_the_way_to_diff(http_server: servers.HTTPServer) -> None:
    name = SERVED.rindex(b"archive/data/0")
    uri = http_server.put("a.ckpt", SERVED)
    flips_in(http_server, name - 30, 0, once=True)
    assert diff(uri, LARGE).same
    assert len(http_server.log) == 4
    http_server.reset()
    flips_in(http_server, name - 30, 0, once=False)
    assert len(diff(uri, LARGE).changed) == 1
    http_server.reset()
    assert len(diff(uri, {"w": LARGE["w"] + 1, "v": LARGE["v"] + 1, "epoch": 3}).changed) == 2
    assert len(http_server.log) == 2  # more than one flipped bit can do


def test_metadata_that_flip_on_the_way(http_server: servers.HTTPServer, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save(LARGE, path, metadata={"run_id": "abc"})
    data = path.read_bytes()
    uri = http_server.put("a.ckpt", data)
    at = data.index(b'"abc"') + 1 - (len(data) - BLOCK_BYTES)
    http_server.reset()
    left = [1]

    def spoil(request: servers.Request) -> servers.Fault | None:
        if request.range != "bytes=-65536" or not left[0]:
            return None
        left[0] -= 1
        return servers.Fault(flip=8 * at)

    http_server.fault = spoil
    assert metadata(uri)["run_id"] == "abc"
    assert left == [0]
    left = [1]
    assert diff(uri, path).same
    assert left == [0]


def test_damaged_metadata_of_a_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save(LARGE, path, metadata={"run_id": "abc"})
    data = path.read_bytes()
    path.write_bytes(flipped(data, 8 * (data.index(b'"abc"') + 1)))
    with pytest.raises(CorruptError, match=f"{path}: .*do not match their checksum"):
        metadata(path)
