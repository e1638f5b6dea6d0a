"""Archives that lie: each ends in a CheckpointError or in the truth, soon, and in little memory."""

import contextlib
import functools
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _anemoi_ckpt.formats.safetensors import read_safetensors
from anemoi_ckpt import CheckpointError, CorruptError, NotACheckpointError, load, peek
from checkpoints import as_bytes, assert_same
from strategies import weights

STATE = {"w": torch.arange(300.0), "v": torch.arange(7), "b": torch.ones(3, dtype=torch.bool)}
SECONDS = 20  # of the processor: those of the clock depend on what else the machine does
many = settings(max_examples=150)


def outcome(path: Path, data: bytes, *strategies: Callable[[Any], Any]) -> Any:
    """Load it, with time and memory taken; give the result, or the CheckpointError's text."""
    path.write_bytes(data)
    begin = time.process_time()
    tracemalloc.start()
    try:
        return load(path, *strategies)
    except CheckpointError as err:
        return str(err)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert time.process_time() - begin < SECONDS
        assert peak < 12 * len(data) + 30_000_000


def refused(path: Path, data: bytes, said: str) -> None:
    for strategies in ((), (weights,), (len,)):
        found = outcome(path, data, *strategies)
        assert isinstance(found, str), found
        assert said in found


# ── zip ───────────────────────────────────────────────────────────────────────────────────────


class Entry:
    """A record of a zip (APPNOTE 4.3), each field of which may be a lie."""

    def __init__(self, name: str, data: bytes, **lies: Any) -> None:
        self.name, self.data = name.encode(), data
        self.lies = lies

    def local(self) -> bytes:
        name = self.name
        extra: bytes = self.lies.get("extra", b"")
        told = self.lies.get("extra_length", len(extra))
        stored, fields = self._fields()
        fields = tuple(min(each, 0xFFFFFFFF) for each in fields)
        return (
            struct.pack("<4s5H3I2H", b"PK\3\4", *fields, len(name), told)
            + name
            + extra
            + stored
            + bytes(self.lies.get("gap", b""))
        )

    def central(self, offset: int) -> bytes:
        _, (version, flags, *fields) = self._fields()
        offset = self.lies.get("offset", offset)
        wide = b""
        if offset > 0xFFFFFFFF or max(fields[-2:]) > 0xFFFFFFFF:
            size, offset_told, stored_size = fields[-1], offset, fields[-2]
            wide = struct.pack("<HHQQQ", 1, 24, size, stored_size, offset_told)
            fields[-2:], offset = [0xFFFFFFFF, 0xFFFFFFFF], 0xFFFFFFFF
        lengths = (len(self.name), len(wide), 0, 0, 0, 0)
        packed = struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 20, version, flags, *fields, *lengths, offset
        )
        return packed + self.name + wide

    def _fields(self) -> tuple[bytes, tuple[int, ...]]:
        method = self.lies.get("method", 0)
        stored = self.data
        if method == 8:
            squeeze = zlib.compressobj(wbits=-15)
            stored = squeeze.compress(self.data) + squeeze.flush()
        crc = self.lies.get("crc", zlib.crc32(self.data))
        size = self.lies.get("size", len(self.data))
        compressed = self.lies.get(
            "compressed", self.lies.get("size", len(stored)) if not method else len(stored)
        )
        return stored, (20, self.lies.get("flags", 0), method, 0, 0, crc, compressed, size)


def archive(*entries: Entry) -> bytes:
    body, central = b"", b""
    for entry in entries:
        central += entry.central(len(body))
        if not entry.lies.get("unwritten"):
            body += entry.local()
    end = struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, len(entries), len(entries), len(central), len(body), 0
    )
    return body + central + end


@functools.cache
def records() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(as_bytes(STATE))) as whole:
        return {info.filename: whole.read(info) for info in whole.infolist()}


def changed(name: str = "", **lies: Any) -> bytes:
    """A valid archive, but for the lies about one record."""
    return archive(*(Entry(n, d, **(lies if n == name else {})) for n, d in records().items()))


WEIGHTS = "archive/data/0"
PICKLE = "archive/data.pkl"


def test_an_archive_of_ours_that_does_not_lie(tmp_path: Path) -> None:
    assert_same(outcome(tmp_path / "a", changed()), STATE)


@pytest.mark.parametrize("name", [WEIGHTS, PICKLE])
def test_a_record_that_is_not_laid_out_as_by_torch(tmp_path: Path, name: str) -> None:
    for lies in ({"gap": bytes(50)}, {"extra": bytes(20), "flags": 8}):
        assert_same(outcome(tmp_path / "a", changed(name, **lies)), STATE)


@pytest.mark.parametrize("name", [WEIGHTS, PICKLE])
@pytest.mark.parametrize(
    ("said", "lies"),
    [
        ("what follows it begins at", {"size": 10**6}),
        ("what follows it begins at", {"size": 2**42}),  # four terabytes
        ("what follows it begins at", {"size": 2**63}),
        ("what follows it begins at", {"offset": 10**6}),
        ("what follows it begins at", {"offset": 2**62}),
        ("has its bytes begin at", {"extra_length": 60_000, "crc": 0}),
        ("do not match their checksum", {"crc": 1}),
        ("what follows it begins at", {"offset": 1}),
        ("", {"flags": 1}),
    ],
)
def test_a_record_that_lies(tmp_path: Path, name: str, said: str, lies: dict[str, int]) -> None:
    found = outcome(tmp_path / "a", changed(name, **lies))
    if isinstance(found, str):
        assert said in found or "two records have the same" in found
    else:
        assert_same(found, STATE)


def test_a_header_that_lies_where_nothing_is_checked(tmp_path: Path) -> None:
    """Without CRCs only the bounds tell: else the memory that nothing filled would be given."""
    for told in (90, 60_000):
        entries = [
            Entry(n, d, crc=0, **({"extra_length": told} if n == WEIGHTS else {}))
            for n, d in records().items()
        ]
        assert "where 1200 bytes from byte" in outcome(tmp_path / "a", archive(*entries))


def test_records_that_share_their_bytes(tmp_path: Path) -> None:
    big = [Entry(n, d) for n, d in records().items()]
    at = len(b"".join(each.local() for each in big))
    shared = [Entry(f"archive/data/{i + 9}", bytes(10**6)) for i in range(1)]
    alias = [
        Entry(f"archive/data/{i + 10}", bytes(10**6), offset=at, unwritten=True) for i in range(99)
    ]
    refused(tmp_path / "a", archive(*big, *shared, *alias), "have the same name or bytes")


def test_records_that_overlap(tmp_path: Path) -> None:
    inside = Entry("archive/data/9", b"", offset=10, unwritten=True)
    entries = [Entry(n, d) for n, d in records().items()]
    refused(tmp_path / "a", archive(*entries, inside), "what follows it begins at byte 10")


def test_names_that_climb_out_or_come_twice(tmp_path: Path) -> None:
    entries = [Entry(n, d) for n, d in records().items()]
    climbing = [Entry("../../up", b"x"), Entry("archive/data/../../up", b"x"), Entry("/etc/x", b"")]
    assert_same(outcome(tmp_path / "a", archive(*entries, *climbing)), STATE)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    twice = Entry(WEIGHTS, bytes(1200))
    refused(tmp_path / "a", archive(*entries, twice), "have the same name or bytes")
    second = Entry("other/data.pkl", records()[PICKLE])
    refused(tmp_path / "a", archive(*entries, second), "without one data.pkl")


def test_a_name_that_is_no_ascii(tmp_path: Path) -> None:
    renamed = [Entry(n.replace("archive", "é"), d, flags=0x800) for n, d in records().items()]
    assert_same(outcome(tmp_path / "a", archive(*renamed)), STATE)
    renamed = [Entry(n.replace("archive", "é"), d) for n, d in records().items()]  # as cp437
    assert_same(outcome(tmp_path / "a", archive(*renamed)), STATE)


def test_a_byte_order_that_is_none(tmp_path: Path) -> None:
    entries = [Entry(n, b"odd" if n.endswith("order") else d) for n, d in records().items()]
    refused(tmp_path / "a", archive(*entries), "its byte order is 'odd'")


def test_the_marks_of_an_archives_end_anywhere(tmp_path: Path) -> None:
    end = struct.pack("<4s12xLL2x", b"PK\5\6", 0, 0)
    for gap in range(100):
        for mark in (b"PK\6\6", b"PK\6\6" * 20):
            data = b"PK\3\4" + bytes(3 * gap) + mark + bytes(gap) + end
            refused(tmp_path / "a.ckpt", data, "a zip archive without one data.pkl")
        refused(tmp_path / "a.ckpt", b"PK\3\4" + end[: gap // 5], "no readable directory")


def test_a_zip_that_is_no_checkpoint_and_one_cut_short(tmp_path: Path) -> None:
    refused(tmp_path / "a", archive(Entry("readme", b"x")), "without one data.pkl")
    data = changed()
    for end in range(4, len(data) - 1, 50):
        refused(tmp_path / "a", data[:end], "no readable directory")


@pytest.mark.parametrize("name", [WEIGHTS, PICKLE])
def test_a_deflated_record(tmp_path: Path, name: str) -> None:
    assert_same(outcome(tmp_path / "a", changed(name, method=8)), STATE)
    for lies in ({"crc": 1}, {"size": 10}):
        refused(tmp_path / "a", changed(name, method=8, **lies), "cannot be unpacked")
    for lies in ({"flags": 1}, {"flags": 1, "method": 8}):
        refused(tmp_path / "a", changed(name, **lies), "or encrypted, as no torch")
    assert_same(outcome(tmp_path / "a", changed(name, method=8, size=10**6)), STATE)
    refused(tmp_path / "a", changed(name, method=8, size=2**42), "unpacked; do not trust it")
    for method in (12, 14):  # bzip2, LZMA
        refused(tmp_path / "a", changed(name, method=method), "not by deflate")
    refused(tmp_path / "a", changed(name, method=99), "not by deflate")
    with pytest.raises(NotACheckpointError):  # nothing of it is damaged
        peek(tmp_path / "a")


def test_a_deflate_bomb_that_denies_it(tmp_path: Path) -> None:
    """200 MB in 200 kB that claim to be 100 bytes."""
    bomb = Entry("archive/data/9", bytes(200 * 10**6), method=8, size=100)
    refused(tmp_path / "a", archive(*(Entry(n, d) for n, d in records().items()), bomb), "unpacked")


def test_a_directory_of_very_many_entries(tmp_path: Path) -> None:
    count = 100_000
    local, central = bytearray(), bytearray()
    for i in range(count):
        name, data = (b"a/data.pkl", b"\x80\x02}.") if not i else (b"a/%07d" % i, b"")
        crc = zlib.crc32(data)
        fields = (0, 0, 0, 0, crc, len(data), len(data), len(name), 0)
        central += struct.pack("<4sHH4H3I5H2I", b"PK\1\2", 20, 20, *fields, 0, 0, 0, 0, len(local))
        central += name
        local += struct.pack("<4sH4H3I2H", b"PK\3\4", 20, *fields) + name + data
    size, offset = len(central), len(local)
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, offset + size, 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    assert outcome(tmp_path / "a", bytes(local + central + end)) == {}


# ── TorchScript ───────────────────────────────────────────────────────────────────────────────


def scripted(pickled: bytes, code: str, **lies: Any) -> bytes:
    return archive(
        Entry("a/data.pkl", pickled),
        Entry("a/constants.pkl", b"\x80\x02)."),
        Entry("a/code/__torch__.py", code.encode(), **lies),
    )


CODE = 'class A(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n'
EMPTY = b"\x80\x02c__torch__\nA\n)\x81}U\x01wNsb."  # A, with None for its parameter


def test_torchscript_archives(tmp_path: Path) -> None:
    assert outcome(tmp_path / "a", scripted(EMPTY, CODE)) == {}
    assert outcome(tmp_path / "a", scripted(EMPTY, CODE, method=8)) == {}
    refused(tmp_path / "a", scripted(EMPTY, CODE, method=8, crc=1), "its code cannot be read")
    refused(tmp_path / "a", scripted(EMPTY, CODE, method=8, size=2**42), "do not trust it")
    refused(tmp_path / "a", scripted(EMPTY, CODE * 10**6, method=8, size=9), "its code cannot")
    refused(tmp_path / "a", scripted(EMPTY, "\0 no code"), "its pickle cannot be read")
    refused(tmp_path / "a", scripted(b"\x80\x02}.", CODE), "its pickle cannot be read")
    refused(tmp_path / "a", scripted(b"\x80\x02c__torch__\nA\n)\x81.", CODE), "cannot be read")


def test_torchscript_modules_that_hold_each_other(tmp_path: Path) -> None:
    itself = b"\x80\x02c__torch__\nA\n)\x81q\x00}(U\x01wNU\x01xh\x00U\x01yh\x00ub."
    refused(tmp_path / "a", scripted(itself, CODE), "without end")
    twice = b"c__torch__\nA\n)\x81}U\x01wNsbq\x00"
    for level in range(60):  # 2**60 paths
        at, after = bytes([level]), bytes([level + 1])
        if level:
            twice += b"0"
        twice += b"c__torch__\nA\n)\x81}(U\x01wNU\x01xh" + at + b"U\x01yh" + at + b"ubq" + after
    refused(tmp_path / "a", scripted(b"\x80\x02" + twice + b".", CODE), "without end")


# ── torch's before 1.6 ────────────────────────────────────────────────────────────────────────


def legacy() -> bytes:
    return as_bytes(STATE, _use_new_zipfile_serialization=False)


def in_a_row(*parts: Any) -> bytes:
    magic, system = 0x1950A86A20F9469CFC6C, {"little_endian": True}
    given = [magic, 1001, system, *parts]
    return b"".join(
        part if isinstance(part, bytes) else pickle.dumps(part, protocol=2) for part in given
    )


def test_a_legacy_file_cut_short_or_with_bytes_after_its_end(tmp_path: Path) -> None:
    data = legacy()
    for end in range(2, len(data), 50):
        refused(tmp_path / "a", data[:end], "cannot be read")
    assert_same(outcome(tmp_path / "a", data + b"x"), STATE)  # as torch.load has it


class Stored:
    """Pickles as a persistent id, which the storages of legacy files are."""

    def __init__(self, *pid: Any) -> None:
        self.pid = pid


def with_ids(obj: Any) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Stored) else None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(obj)
    return out.getvalue()


def deep() -> Any:
    """Some 300 bytes of pickle, to show or to hash which takes 2**60 steps."""
    found: Any = ()
    for _ in range(60):
        found = (found, found)
    return found


def test_legacy_counts_and_keys_that_lie(tmp_path: Path) -> None:
    kind = torch.FloatStorage
    good = Stored("storage", kind, "0", "cpu", 2, None)
    tail = (2).to_bytes(8, "little") + bytes(8)
    assert outcome(tmp_path / "a", in_a_row(with_ids({}), [])) == {}
    found = outcome(tmp_path / "a", in_a_row(with_ids([good, good]), ["0"], tail))
    assert [each.nbytes() for each in found] == [8, 8]
    assert found[0].data_ptr() == found[1].data_ptr()
    for pid in (
        ("storage", kind, "0", "cpu", 10**15, None),
        ("storage", kind, "0", "cpu", -2, None),
        ("storage", kind, "0", "cpu", 2.0, None),
        ("storage", kind, "0", "cpu", 2, ("a view",)),
        ("storage", kind, "0", "cpu", 2, ("a view", 0, 1), "more"),
        ("storage", kind, 0, "cpu", 2, None),
        ("storage", kind, deep(), "cpu", 2, None),
        ("storage", int, "0", "cpu", 2, None),
        ("storage", OfNothing, "0", "cpu", 2, None),
        ("another", kind, "0", "cpu", 2, None),
        (deep(), kind, "0", "cpu", 2, None),
        ("storage",),
        (),
    ):
        refused(tmp_path / "a", in_a_row(with_ids([Stored(*pid)]), ["0"], tail), "cannot be read")
    for keys in ([], ["1"], ["0", "0"], [0], [deep()], None, {"0": 1, "1": 2}, good, deep()):
        refused(tmp_path / "a", in_a_row(with_ids([good]), with_ids(keys), tail), "cannot be read")


class OfNothing:
    dtype = "none"


def test_legacy_facts_that_are_none(tmp_path: Path) -> None:
    rest = b"".join(pickle.dumps(each, protocol=2) for each in (dict[str, int](), list[str]()))
    magic = 0x1950A86A20F9469CFC6C
    systems: tuple[Any, ...] = ({}, None, 3, deep())
    for system in systems:
        data = b"".join(pickle.dumps(each, protocol=2) for each in (magic, 1001, system)) + rest
        refused(tmp_path / "a", data, "cannot be read")
    refused(tmp_path / "a", pickle.dumps(deep(), protocol=2), "not one of torch.save")
    claims = b"\x80\x04\x8e" + (2**40).to_bytes(8, "little")  # BINBYTES8: a terabyte
    refused(tmp_path / "a", in_a_row(claims), "cannot be read")
    refused(tmp_path / "a", in_a_row(b"\x80\x02" + b"(" * 10**5), "cannot be read")


def test_a_legacy_file_of_very_many_storages(tmp_path: Path) -> None:
    ids = [Stored("storage", torch.ByteStorage, str(i), "cpu", 0, None) for i in range(20_000)]
    keys = [str(i) for i in range(20_000)]
    data = in_a_row(with_ids(ids), keys, bytes(8 * 20_000))
    assert len(load_bytes(tmp_path, data)) == 20_000


def load_bytes(tmp_path: Path, data: bytes) -> Any:
    (tmp_path / "a").write_bytes(data)
    begin = time.process_time()
    found = load(tmp_path / "a")
    assert time.process_time() - begin < SECONDS
    return found


# ── safetensors ───────────────────────────────────────────────────────────────────────────────


def tensors(header: str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_safetensors_that_do_not_lie(tmp_path: Path) -> None:
    assert outcome(tmp_path / "a", tensors({})) == {}
    found = outcome(tmp_path / "a", tensors({"w": entry()}, bytes(8)))
    assert_same(found, {"w": torch.zeros(2)})
    assert outcome(tmp_path / "a", tensors({"w": entry("U8", [2**40, 0], [0, 0])}))["w"].shape == (
        2**40,
        0,
    )


def test_safetensors_whose_names_are_those_of_the_header_itself(tmp_path: Path) -> None:
    told = {"dtype": "a", "shape": "b", "data_offsets": "c"}
    more = entry("U8", (1,), (2, 3)) | {"beside": 1}
    header = {
        "shape": entry("U8", (1,), (0, 1)),
        "dtype": entry("U8", (1,), (1, 2)),
        "data_offsets": more,
        "__metadata__": told,
    }
    found = outcome(tmp_path / "a", tensors(header, bytes([1, 2, 3])))
    assert {name: int(value) for name, value in found.items()} == {
        "shape": 1,
        "dtype": 2,
        "data_offsets": 3,
    }
    assert peek(tmp_path / "a").notes == told


def test_a_safetensors_header_takes_a_few_times_its_length(tmp_path: Path) -> None:
    data = tensors({str(n): entry("U8", (0,), (0, 0)) for n in range(5_000)})
    read_safetensors("a", io.BytesIO(data), len(data))  # what is imported for the first time
    tracemalloc.start()
    archive = read_safetensors("a", io.BytesIO(data), len(data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(archive.records) == 5_000
    assert peak < 12 * len(data)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8, 3000])
def test_a_safetensors_header_of_too_many_bytes(tmp_path: Path, length: int) -> None:
    refused(tmp_path / "a", tensors({"w": entry()}, bytes(8), length), "its header claims")


LIES: dict[str, Any] = {
    "overlap": {"a": entry(), "b": entry(offsets=(4, 12))},
    "the same": {"a": entry(), "b": entry()},
    "gap": {"a": entry(), "b": entry(offsets=(12, 20))},
    "gap at the start": {"a": entry(offsets=(8, 16))},
    "beyond the end": {"a": entry(), "b": entry("F32", (10,), (8, 48))},
    "not to the end": {"a": entry("F32", (1,), (0, 4))},
    "negative": {"a": entry(offsets=(-8, 0))},
    "backwards": {"a": entry(offsets=(8, 0))},
    "negative shape": {"a": entry(shape=(-1, -2))},
    "terabytes": {"a": entry("F32", (2**40,), (0, 2**42))},
    "huge shape": {"a": entry("F32", (2**62, 2**62), (0, 8))},
    "huge shape of nothing": {"a": entry("F32", (2**62, 0), (0, 0))},
    "very many dimensions": {"a": entry("F32", [2**61] * 10**5, (0, 8))},
    "floating shape": {"a": entry(shape=(2.0,))},
    "floating offsets": {"a": entry(offsets=(0.0, 8.0))},
    "text for offsets": {"a": entry(offsets=("0", "8"))},
    "no numbers": '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [NaN, Infinity]}}',
    "true": {"a": entry(shape=(True, 2))},
    "one offset": {"a": entry(offsets=(0,))},
    "three offsets": {"a": entry(offsets=(0, 4, 8))},
    "no shape": {"a": {"dtype": "F32", "data_offsets": (0, 8)}},
    "no dtype": {"a": entry(None)},
    "unknown dtype": {"a": entry("F7")},
    "a dtype that is a list": {"a": entry(["F32"])},
    "no dict": {"a": [1, 2]},
    "no dict at all": '{"a": 3}',
    "twice": '{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2),
    "metadata": {"__metadata__": [1], "a": entry()},
    "metadata that is none": {"__metadata__": None, "a": entry()},
    "deep": '{"a": ' + "[" * 100_000,
    "deep and closed": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deeper": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "no end": '{"a": ',
    "two": "{} {}",
    "a number without end": '{"a": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(tmp_path: Path, lie: str) -> None:
    refused(tmp_path / "a", tensors(LIES[lie], bytes(16)), "its header cannot be read")


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("overlap", "'b' is not as long as its shape, or stands in a gap"),
        ("terabytes", "it describes"),
        ("negative shape", "is no shape"),
        ("huge shape", "is no shape"),
        ("huge shape of nothing", "is no shape"),
        ("floating shape", "is no shape"),
        ("true", "is no shape"),
        ("twice", "a name stands there twice"),
    ],
)
def test_the_lie_of_safetensors_is_named(tmp_path: Path, lie: str, said: str) -> None:
    refused(tmp_path / "a", tensors(LIES[lie], bytes(16)), said)


def test_safetensors_shorter_than_their_shape(tmp_path: Path) -> None:
    header = {"a": entry("F32", (4,), (0, 8)), "b": entry("F32", (2,), (8, 16))}
    refused(tmp_path / "a", tensors(header, bytes(16)), "'a' is not as long as its shape")


@pytest.mark.parametrize("header", ["[]", "3", '"a"', "[" * 1000, "NaN"])
def test_a_header_that_is_no_dict(tmp_path: Path, header: str) -> None:
    with pytest.raises(NotACheckpointError):
        outcome_raised(tmp_path, tensors(header))


def outcome_raised(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    load(tmp_path / "a")


def test_a_header_that_is_no_text(tmp_path: Path) -> None:
    refused(tmp_path / "a", (9).to_bytes(8, "little") + b'{"\xff\xff": 1}', "cannot be read")


# ── anything ──────────────────────────────────────────────────────────────────────────────────


@functools.cache
def seeds() -> list[bytes]:
    """A valid file of every format."""
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 2)), script)
    return [
        as_bytes(STATE),
        changed(),
        changed(WEIGHTS, method=8),
        legacy(),
        as_bytes(torch.nn.Linear(3, 2), _use_new_zipfile_serialization=False),
        safetensors.torch.save(STATE, {"format": "pt"}),
        script.getvalue(),
    ]


def only_checkpoint_errors(path: Path, data: bytes, *strategies: Callable[[Any], Any]) -> None:
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        load(path, *strategies)


@many
@given(
    start=st.sampled_from([b"", b"PK\3\4", b"\x80\x02", b'\2\0\0\0\0\0\0\0{"']), rest=st.binary()
)
def test_random_bytes(tmp_path: Path, start: bytes, rest: bytes) -> None:
    only_checkpoint_errors(tmp_path / "a", start + rest)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("seed", range(7))
@many
@given(data=st.data())
def test_a_valid_file_that_was_changed(tmp_path: Path, seed: int, data: st.DataObject) -> None:
    spoilt = bytearray(seeds()[seed])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(spoilt) - 1))
        spoilt[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    del spoilt[data.draw(st.integers(1, 3 * len(spoilt))) :]
    only_checkpoint_errors(
        tmp_path / "a", bytes(spoilt), *data.draw(st.sampled_from([(), (type,)]))
    )


def test_memory_of_a_bomb_as_the_system_counts_it(tmp_path: Path) -> None:
    bomb = Entry("archive/data/9", bytes(400 * 10**6), method=8, size=100)
    (tmp_path / "a").write_bytes(archive(*(Entry(n, d) for n, d in records().items()), bomb))
    code = (
        "import resource, sys; from anemoi_ckpt import CheckpointError, load\n"
        "begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load(sys.argv[1])\n"
        "except CheckpointError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin)"
    )
    home = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=True,
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home)},
    )
    assert int(done.stdout) < 100_000  # kB
    with pytest.raises(CorruptError):
        load(tmp_path / "a")
