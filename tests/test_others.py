"""What is no checkpoint is said as what it is, with the way out; and that way leads out."""

import gzip
import io
import socket
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import servers
from anemoi_ckpt import CheckpointError, InvalidURIError, NotACheckpointError, load
from checkpoints import as_bytes

DATA = as_bytes({"w": torch.ones(3)})


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, DATA if name.endswith((".ckpt", ".pt")) else b"{}")
    return stream.getvalue()


def tarred(*names: str, mode: Any = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(DATA)
            archive.addfile(info, io.BytesIO(DATA))
    return stream.getvalue()


def arrays(save: Callable[..., None]) -> bytes:
    stream = io.BytesIO()
    save(stream, np.ones(3))
    return stream.getvalue()


OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a certificate": (
        lambda: b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        "it is a PEM file, such as a certificate; give the checkpoint's own path",
    ),
    "a certificate in DER": (
        lambda: bytes.fromhex("308201 6e308201 13a00302 01020214 404de59e 3375ff25") + bytes(349),
        "it is a certificate, in DER; give the checkpoint's own path",
    ),
    "a small certificate in DER": (
        lambda: bytes.fromhex("3082012c 3081dfa0 03020102 021415cf fb9861ac 4c51fa7c") + bytes(280),
        "it is a certificate, in DER",
    ),
    "no certificate": (lambda: b"0\x82\1\2" + bytes(300), "begins with b'0.x82"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "it is an HDF5 file; read it with h5py"),
    "GGUF": (lambda: b"GGUF\3\0\0\0" + bytes(99), "it is a GGUF file"),
    "NetCDF": (lambda: b"CDF\1" + bytes(99), "it is a NetCDF file"),
    "zeros": (lambda: bytes(9999), "it is zeros, at its beginning; was its upload or"),
    "an array": (lambda: arrays(np.save), "it is an array of NumPy; read it with numpy.load"),
    "arrays": (lambda: arrays(np.savez), "a zip archive of NumPy's arrays"),
    "a page": (lambda: b"\n<!DOCTYPE html><html>", "it is an HTML.*or of a login?"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "a zip of others": (lambda: zipped("a.txt"), "a zip archive without one data.pkl in it"),
    "a zip": (
        lambda: zipped("read.me", "run/", "run/last.ckpt"),
        r"a zip archive with 'run/last.ckpt' in it; .*ZipFile\(path\).open\('run/last.ckpt'\)",
    ),
    "a zip with many": (
        lambda: zipped(*(f"{number}.ckpt" for number in range(5))),
        "a zip archive with '0.ckpt', '1.ckpt', '2.ckpt' and 2 more in it",
    ),
    "a .mar": (
        lambda: zipped("MAR-INF/MANIFEST.json", "handler.py", "model.pt"),
        "an archive of TorchServe with 'model.pt' in it",
    ),
    "a program": (
        lambda: zipped("e/data/sample_inputs/model.pt", "e/models/model.json", "e/archive_format"),
        "it is a program of torch.export; save its weights: torch.save",
    ),
    "an old program": (
        lambda: zipped("version", "serialized_state_dict.pt", "serialized_exported_program.json"),
        "it is a program of torch.export",
    ),
    "a tar": (
        lambda: tarred("./model_config.yaml", "./weights.ckpt"),
        r"a tar archive with './weights.ckpt' in it; .*extractfile\('./weights.ckpt'\)",
    ),
    "a .tar.gz": (
        lambda: tarred("weights.ckpt", mode="w:gz"),
        "tar archive with 'weights.ckpt'",
    ),
    "a tar of others": (lambda: tarred("a.txt"), "a tar archive, and not one of torch 0.1"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_it_is_said_what_it_is(kind: str, tmp_path: Path, http_server: servers.HTTPServer) -> None:
    make, said = OTHERS[kind]
    data = make()
    (tmp_path / "a").write_bytes(data)
    for place in (tmp_path / "a", http_server.put("a.ckpt", data), io.BytesIO(data)):
        with pytest.raises(NotACheckpointError, match=said):
            load(place)


def test_the_way_out_of_an_archive_leads_out(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(zipped("run/last.ckpt"))
    with zipfile.ZipFile(path) as archive, archive.open("run/last.ckpt") as member:
        assert load(cast("Any", member))["w"].tolist() == [1, 1, 1]
    path.write_bytes(tarred("run/last.ckpt"))
    with tarfile.open(path) as archive:
        assert load(cast("Any", archive.extractfile("run/last.ckpt")))["w"].tolist() == [1, 1, 1]


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="sockets have no paths here")
def test_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("s")
        with pytest.raises(InvalidURIError, match="a pipe or a device, not a file"):
            load("s")


def test_links_that_lead_to_each_other(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"[Tt]oo many.* links.*; check the disk") as caught:
        load(tmp_path / "a")
    assert type(caught.value) is CheckpointError


@pytest.mark.parametrize("ranged", [True, False])
def test_a_shard_without_bytes(http_server: servers.HTTPServer, ranged: bool) -> None:
    http_server.put("1.bin", as_bytes({"a": torch.ones(2)}))
    http_server.put("2.bin", b"")
    uri = http_server.put("index.json", b'{"weight_map": {"a": "1.bin", "b": "2.bin"}}')
    if not ranged:
        http_server.fault = lambda request: servers.Fault(ignore_range=True)
    with pytest.raises(NotACheckpointError, match=r"2.bin: the file is empty"):
        load(uri)


def test_a_compressed_file_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(NotACheckpointError, match=r"a.ckpt.gz: the file is empty"):
        load(tmp_path / "a.ckpt.gz")


def test_a_compressed_file_has_a_bar_of_its_own_name(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.ckpt.gz").write_bytes(gzip.compress(as_bytes({"a": torch.ones(2)})))
    assert load(tmp_path / "a.ckpt.gz", progress=True)["a"].tolist() == [1, 1]
    assert capsys.readouterr().err.count("a.ckpt.gz: 100%") >= 2  # as it is read, and unpacked


def test_a_certificate_of_the_users(http_server: servers.HTTPServer, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", as_bytes({"a": torch.ones(2)}))
    (tmp_path / "me.pem").touch()
    found = load(uri, transport_params={"cert": str(tmp_path / "me.pem")})
    assert found["a"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"certificate.*none.pem"):
        load(uri, transport_params={"cert": str(tmp_path / "none.pem")}, retries=0)
