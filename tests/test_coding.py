"""Content codings: what was compressed on its way, or in the store, comes as the file it is of."""

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

import servers
from _anemoi_ckpt.blocks import BLOCK_BYTES
from anemoi_ckpt import CheckpointError, CorruptError, download, load, open_stream, peek
from checkpoints import as_bytes, assert_same

CHECKPOINT = {"w": torch.arange(60_000.0), "v": torch.ones(3)}
DATA = as_bytes(CHECKPOINT)
ONCE = gzip.compress(DATA)
TWICE = gzip.compress(ONCE)
OTHER = {"w": torch.arange(9.0)}


def marked(coding: str) -> dict[str, str]:
    return {"Content-Encoding": coding}


# ── servers that compress, or say so ──────────────────────────────────────────────────────────

ANSWERS = {  # the file's name, what it holds, what the server does
    "a .gz that is marked": ("a.ckpt.gz", ONCE, servers.Fault(headers=marked("gzip"))),
    "likewise, by Apache": ("a.ckpt.gz", ONCE, servers.Fault(headers=marked("x-gzip"))),
    "a .gz compressed on the way": ("a.ckpt.gz", ONCE, servers.Fault(gzip=True)),
    "another name, marked": ("a.ckpt", ONCE, servers.Fault(headers=marked("gzip"))),
    "another name, on the way": ("a.ckpt", DATA, servers.Fault(gzip=True)),
    "no coding at all": ("a.ckpt", DATA, servers.Fault(headers=marked("identity"))),
    "how it came to S3": ("a.ckpt", DATA, servers.Fault(headers=marked("aws-chunked"))),
    "another name, unmarked": ("a.ckpt", ONCE, servers.Fault()),
    "a .gz that is none": ("a.ckpt.gz", DATA, servers.Fault()),
}


@pytest.mark.parametrize("whole", [False, True], ids=["ranges", "whole"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_file_comes_as_it_is(
    http_server: servers.HTTPServer, answer: str, whole: bool, tmp_path: Path
) -> None:
    name, stored, fault = ANSWERS[answer]
    uri = http_server.put(name, stored)
    headers = {"ignore_range": True} if whole else {}
    http_server.fault = lambda request: servers.Fault(
        gzip=fault.gzip, headers=fault.headers, **headers
    )
    assert_same(load(uri), CHECKPOINT)
    assert peek(uri).checked
    kept = download(uri, tmp_path).read_bytes()
    plain = answer.startswith("another name") and answer != "another name, unmarked"
    assert kept == (DATA if plain else stored)
    with open_stream(uri) as stream:
        assert stream.read() == kept
    assert_same(load(tmp_path / name), CHECKPOINT)


def test_a_zst_that_is_marked_is_kept_as_it_is(
    http_server: servers.HTTPServer, tmp_path: Path
) -> None:
    data = b"\x28\xb5\x2f\xfd and so on"
    uri = http_server.put("a.ckpt.zst", data)
    http_server.fault = lambda request: servers.Fault(headers=marked("zstd"))
    assert download(uri, tmp_path).read_bytes() == data


def test_what_is_marked_as_no_coding_comes_in_ranges(http_server: servers.HTTPServer) -> None:
    big = {"w": torch.arange(3_000_000.0), "v": torch.ones(3)}
    uri = http_server.put("a.ckpt", as_bytes(big))
    http_server.fault = lambda request: servers.Fault(headers=marked("identity"))
    load(uri, lambda checkpoint: checkpoint["v"])
    assert http_server.bytes_sent < 2**20


def test_a_coding_that_nobody_can_undo_is_told(
    http_server: servers.HTTPServer, tmp_path: Path
) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: servers.Fault(headers=marked("compress, br9"))
    for read in (load, lambda uri: download(uri, tmp_path / "a.ckpt")):
        with pytest.raises(CheckpointError, match="the server sends it as br9, compress, though"):
            read(uri)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_first_bytes_tell_the_compression(suffix: str, pack: Any, tmp_path: Path) -> None:
    for name in ("a.ckpt", f"a.ckpt{suffix}", "a.pt.GZ"):
        (tmp_path / name).write_bytes(pack(DATA))
        assert_same(load(tmp_path / name), CHECKPOINT)
    (tmp_path / "b.ckpt").write_bytes(pack(DATA)[:-99])
    with pytest.raises(CorruptError, match=f"it cannot be decompressed as {suffix}"):
        load(tmp_path / "b.ckpt")


# ── stores that keep it compressed (gsutil cp -Z, aws s3 cp --content-encoding gzip) ──────────


def put(store: servers.Store, name: str, data: bytes) -> str:
    """Store an object that is marked as gzip's."""
    if store.kind == "s3":
        store.sdk.put_object(Bucket=servers.BUCKET, Key=name, Body=data, ContentEncoding="gzip")
    elif store.kind == "gcs":
        blob = store.sdk.bucket(servers.BUCKET).blob(name)
        blob.content_encoding = "gzip"
        blob.upload_from_string(data)
    else:
        import azure.storage.blob

        settings = azure.storage.blob.ContentSettings(content_encoding="gzip")
        blob = store.sdk.get_blob_client(servers.BUCKET, name)
        blob.upload_blob(data, overwrite=True, content_settings=settings)
    return store.uri(name)


@pytest.fixture(params=["s3", "gcs", "azure"])
def store(request: pytest.FixtureRequest) -> servers.Store:
    found: servers.Store = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize(
    ("name", "stored", "kept"),
    [
        ("a.ckpt", ONCE, DATA),
        ("a.ckpt.gz", ONCE, ONCE),
        ("a.ckpt.gz", TWICE, ONCE),
        ("a.ckpt", DATA, DATA),  # and the mark is wrong
    ],
    ids=["-Z", "a .gz", "a .gz and -Z", "a lie"],
)
def test_an_object_that_is_stored_compressed(
    store: servers.Store, name: str, stored: bytes, kept: bytes, tmp_path: Path
) -> None:
    uri = put(store, f"coded/{name}", stored)
    assert_same(load(uri), CHECKPOINT)
    assert_same(load(uri, cached=True), CHECKPOINT)
    assert peek(uri).bytes_moved <= len(stored) + 2 * BLOCK_BYTES
    path = download(uri, tmp_path)
    assert path.read_bytes() == kept
    assert_same(load(path), CHECKPOINT)
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_its_sum_is_that_of_the_file(s3: servers.Store, tmp_path: Path) -> None:
    import hashlib

    uri = put(s3, "coded/a.ckpt", ONCE)
    digest = hashlib.sha256(DATA).hexdigest()
    assert download(uri, tmp_path, sha256=digest).read_bytes() == DATA
    with pytest.raises(CorruptError, match=f"its sha256 is {digest}, and not the one asked for"):
        download(uri, tmp_path / "b.ckpt", sha256="0" * 64)
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_compressed_object_that_is_cut_or_a_bomb(s3: servers.Store, tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(2**27))
    for data, said in ((ONCE[:-999], "it cannot be decompressed"), (bomb, "claim to be")):
        uri = put(s3, "coded/b.ckpt", data)
        for read in (load, lambda uri: download(uri, tmp_path / "b.ckpt")):
            with pytest.raises(CorruptError, match=said):
                read(uri)
    assert [*tmp_path.iterdir()] == []


def test_a_damaged_tensor_in_what_was_compressed(gcs: servers.Store, tmp_path: Path) -> None:
    spoiled = bytearray(DATA)
    spoiled[len(DATA) // 2] ^= 1
    uri = put(gcs, "coded/c.ckpt", gzip.compress(bytes(spoiled)))
    for read in (load, lambda uri: download(uri, tmp_path / "c.ckpt")):
        with pytest.raises(CorruptError, match="do not match their checksum"):
            read(uri)
    assert [*tmp_path.iterdir()] == []
