"""A checkpoint in an open file: `io.BytesIO`, a member of a tar, a pipe."""

import copy
import gzip
import io
import os
import pickle
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import smart_open.compression
import torch

import _anemoi_ckpt.formats.torch_zip
import _anemoi_ckpt.transport
from _anemoi_ckpt.places.streams import parse_place
from anemoi_ckpt import (
    InvalidURIError,
    NotACheckpointError,
    StreamURI,
    download,
    load,
    load_into,
    peek,
    save,
)
from checkpoints import as_bytes, assert_same
from strategies import include

CHECKPOINT = {"a": torch.arange(200_000), "b": {"c": torch.ones(300_000)}}
DATA = as_bytes(CHECKPOINT)


class Counting(io.BytesIO):
    """Counts what is read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def test_an_open_file_is_a_place(tmp_path: Path) -> None:
    stream = Counting(DATA)
    assert_same(load(stream, include("a")), {"a": CHECKPOINT["a"]})
    assert stream.tell() == 0
    assert stream.count < 1_600_000 + 2 * 65_536 + 20_000  # what survives, and the two blocks
    assert_same(load(stream), CHECKPOINT)
    assert "BytesIO" in str(peek(io.BytesIO(DATA)))
    assert download(stream, tmp_path / "copy.ckpt").read_bytes() == DATA
    (tmp_path / "file.ckpt").write_bytes(DATA)
    with (tmp_path / "file.ckpt").open("rb") as file:
        assert_same(load(file), CHECKPOINT)
        assert not file.closed


def test_what_is_unpacked_no_longer_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt.gz"
    path.write_bytes(gzip.compress(DATA))
    with gzip.open(path) as unpacked, path.open("rb") as packed:
        assert_same(load(unpacked), CHECKPOINT)
        assert_same(load(packed), CHECKPOINT)
    with path.open("rb", buffering=0) as raw:
        assert parse_place(raw).filename == "a.ckpt.gz"


def test_it_begins_where_the_file_stands() -> None:
    stream = io.BytesIO(b"something before" + DATA)
    stream.seek(len(b"something before"))
    assert_same(load(stream), CHECKPOINT)
    assert stream.tell() == len(b"something before")
    stream.seek(0)
    with pytest.raises(NotACheckpointError, match="BytesIO"):
        load(stream)


def test_a_member_of_a_tar(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(DATA)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.ckpt", "run/a.ckpt")
    with tarfile.open(tmp_path / "a.tar") as tar:
        member = tar.extractfile("run/a.ckpt")
        assert_same(load(member), CHECKPOINT)


def test_a_model_is_filled_from_an_open_file() -> None:
    model = torch.nn.Linear(3, 1)
    other = copy.deepcopy(model)
    torch.nn.init.ones_(other.weight)
    load_into(model, io.BytesIO(as_bytes(other.state_dict())))
    assert torch.equal(model.weight, torch.ones(1, 3))


def test_a_pipe_is_named_as_one_and_taken_whole_where_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(InvalidURIError, match=r"a pipe or a device.*\n?.*open\(path, 'rb'\)"):
        load(path)
    with pytest.raises(InvalidURIError, match="a pipe or a device"):
        load("/dev/null")

    def write() -> None:
        path.write_bytes(DATA)

    thread = threading.Thread(target=write)
    thread.start()
    with path.open("rb", buffering=0) as pipe:
        assert_same(load(pipe), CHECKPOINT)
    thread.join(60)
    assert not thread.is_alive()


def test_a_file_of_text_and_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(DATA)
    with (tmp_path / "a.ckpt").open() as text, pytest.raises(TypeError, match="mode 'rb'"):
        load(text)
    with pytest.raises(TypeError, match="is a text or a path"):
        load(3)


def test_an_open_file_stays_in_its_process() -> None:
    uri = parse_place(io.BytesIO(DATA))
    assert isinstance(uri, StreamURI)
    assert (uri.filename, uri.connections) == ("BytesIO", 1)
    with pytest.raises(TypeError, match="give a path or a URL"):
        pickle.dumps(uri)


def test_an_open_file_that_breaks_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)

    class Breaking(io.BytesIO):
        broken = False

        def read(self, size: int | None = -1) -> bytes:
            if not self.broken and self.tell() > 100_000:
                self.broken = True
                raise ConnectionResetError
            return super().read(size)

    stream: Any = Breaking(DATA)
    assert_same(load(stream), CHECKPOINT)
    assert stream.broken


class OwnError(Exception):
    """An error of code that is the user's."""


@pytest.mark.parametrize("error", [OwnError("mine"), ValueError("mine"), MemoryError("mine")])
@pytest.mark.parametrize("after", [0, 100_000])
def test_what_a_stream_of_the_users_raises_comes_as_it_is(error: Exception, after: int) -> None:
    class Raising(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= after:
                raise error
            return super().read(size)

    for call in (load, peek) if after == 0 else (load,):
        with pytest.raises(type(error)) as caught:
            call(Raising(DATA))
        assert caught.value is error
    model = torch.nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)) as caught:
        load_into(model, Raising(DATA))
    assert caught.value is error
    assert_same(dict(model.state_dict()), dict(before))


class Full:
    """An object that no memory is left for when it is pickled."""

    def __reduce__(self) -> Any:
        raise MemoryError("full")


def test_a_lack_of_memory_is_no_fault_of_the_file(tmp_path: Path, monkeypatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("full")

    (tmp_path / "a.ckpt.gz").write_bytes(gzip.compress(DATA))
    deflated = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(DATA)) as stored, zipfile.ZipFile(deflated, "w", 8) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    (tmp_path / "b.ckpt").write_bytes(deflated.getvalue())
    assert_same(load(tmp_path / "b.ckpt"), CHECKPOINT)
    monkeypatch.setattr(_anemoi_ckpt.formats.torch_zip, "unpack", full)
    monkeypatch.setattr(smart_open.compression, "compression_wrapper", full)
    for place in (tmp_path / "a.ckpt.gz", tmp_path / "b.ckpt"):
        with pytest.raises(MemoryError, match="full"):
            load(place)
    with pytest.raises(MemoryError, match="full"):
        save({"a": Full()}, tmp_path / "c.ckpt")
    assert not (tmp_path / "c.ckpt").exists()


def test_the_index_of_shards_as_an_open_file(tmp_path: Path) -> None:
    index = b'{"metadata": {}, "weight_map": {"w": "model-1.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    (tmp_path / "model-1.safetensors").write_bytes(index)
    with (tmp_path / "model.safetensors.index.json").open("rb") as file:
        for stream in (file, io.BytesIO(index)):
            for read in (load, peek):
                with pytest.raises(InvalidURIError, match="give its path or its URL, and not the"):
                    read(stream)
