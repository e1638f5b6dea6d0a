"""What is in a checkpoint: peek, metadata, save, and the command line."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import _anemoi_ckpt.progress
import _anemoi_ckpt.transport
import anemoi_ckpt
import needs
import servers
from _anemoi_ckpt.tables import sized
from anemoi_ckpt import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptError,
    Inert,
    InvalidURIError,
    load,
    main,
    metadata,
    peek,
    save,
)
from checkpoints import WRITER, as_bytes, assert_same, lightning_checkpoint, odd_checkpoint
from strategies import drop_optimizer, weights

ROOT = Path(anemoi_ckpt.__file__).parent


class Own:
    """A class of nobody's package."""

    def __init__(self) -> None:
        self.scale = torch.full((2,), 3.0)
        self.twin = self


def training() -> dict[str, Any]:
    weight = torch.ones(100, 100)
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"a.weight": weight, "tied": weight, "a.bias": torch.ones(10).half()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(20_000)}}}],
        "hyper_parameters": {"own": Own()},
    }


# ── peek ──────────────────────────────────────────────────────────────────────────────────────


def test_peek_tells_what_is_inside(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(as_bytes(training()))
    found = peek(tmp_path / "a.ckpt")
    assert (found.format, found.bytes) == ("torch zip", (tmp_path / "a.ckpt").stat().st_size)
    assert (found.epoch, found.global_step, found.lightning) == (3, 1200, "2.6.0")
    assert (found.torch, found.checked, found.metadata) == (WRITER, True, None)
    assert found.keys == {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": 0,
        "state_dict": 40_020,
        "optimizer_states": 80_000,
        "hyper_parameters": 8,
    }
    shown = [(t.key, t.name, t.shape, t.dtype, t.bytes) for t in found.tensors]
    assert shown == [
        ("state_dict", "a.weight", (100, 100), torch.float32, 40_000),
        ("state_dict", "tied", (100, 100), torch.float32, 40_000),
        ("state_dict", "a.bias", (10,), torch.float16, 20),
        ("optimizer_states", "0.state.0.exp_avg", (20_000,), torch.float32, 80_000),
        ("hyper_parameters", "own.scale", (2,), torch.float32, 8),
    ]
    assert [name for name, inert in found.classes.items() if inert] == [f"{Own.__module__}.Own"]
    assert found.classes["torch._utils._rebuild_tensor_v2"] is False


def test_peek_prints_as_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(as_bytes(training()))
    shown = repr(peek(tmp_path / "a.ckpt"))
    assert "weights 40 kB · optimizer 80 kB · hyper_parameters 8 B" in shown
    assert "epoch 3 · step 1200" in shown
    assert "a.weight  (100, 100) float32 40 kB" in shown
    assert f"classes 5   1 inert\n{' ' * 12}{Own.__module__}.Own" in shown
    assert "<td" in peek(tmp_path / "a.ckpt")._repr_html_()
    torch.save({f"layers.{i}.w": torch.ones(1) for i in range(9)}, tmp_path / "b.ckpt")
    assert "layers.{0…8}.w" in repr(peek(tmp_path / "b.ckpt"))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (1.07e9, "1.07 GB"),
        (3e15, "3e+03 TB"),
    ],
)
def test_sizes_are_written_as_people_read_them(count: float, text: str) -> None:
    assert sized(int(count)) == text


def test_peek_takes_few_requests_whatever_the_size(place: Any) -> None:
    state = {f"layers.{i}.weight": torch.zeros(500) for i in range(3000)}
    data = as_bytes({"state_dict": state, "hyper_parameters": {"text": "x" * 300_000}})
    data = with_metadata(data, {"version": "1.0", "text": "y" * 200_000})
    uri = place.put("a.ckpt", data)
    if place.server is not None:
        place.server.reset()
    found = peek(uri)
    assert len(found.tensors) == 3000
    assert found.metadata is not None
    assert found.bytes_moved < len(data) / 4
    if place.server is not None:
        most = 6 if place.kind in {"gcs", "azure"} else 5  # asked for size and version first
        assert len(place.server.log) <= most


def test_peek_of_a_legacy_file_reads_twice_as_much_with_each_request(http_server) -> None:
    state = {f"layers.{i}.weight": torch.zeros(500) for i in range(3000)}
    checkpoint = {"state_dict": state, "hyper_parameters": {"text": "x" * 2_000_000}}
    data = as_bytes(checkpoint, _use_new_zipfile_serialization=False)
    found = peek(http_server.put("a.ckpt", data))
    assert len(found.tensors) == 3000
    assert found.bytes_moved < 2 * (len(data) - 3000 * 2000) + 2 * 64 * 1024
    assert len(http_server.log) <= 8


def test_peek_of_shards_reads_each_in_two_requests(http_server) -> None:
    names = {f"layers.{i}": f"{i}.bin" for i in range(5)}
    for tensor, name in names.items():
        http_server.put(name, as_bytes({tensor: torch.zeros(100_000)}))
    uri = http_server.put("model.bin.index.json", json.dumps({"weight_map": names}).encode())
    found = peek(uri)
    assert [each.name for each in found.tensors] == list(names)
    assert len(http_server.log) == 2 + 2 * len(names)
    assert found.bytes_moved < 2 * 64 * 1024 * len(names) + 2000  # of the index


@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning")  # torch's own plans for them
def test_peek_of_what_cannot_be_hollow(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.qint8)
    (tmp_path / "a.ckpt").write_bytes(as_bytes({"q": quantized}))
    assert [(t.name, t.shape, t.bytes) for t in peek(tmp_path / "a.ckpt").tensors] == [
        ("q", (4,), 4)
    ]


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
def test_peek_of_an_inert_object_with_tensors_among_its_arguments(tmp_path: Path) -> None:
    class Held:
        def __reduce__(self) -> Any:
            return Container, ([torch.ones(3)], torch.zeros(5)), {"state": torch.ones(2)}

    torch.save(Held(), tmp_path / "a.ckpt")
    found = peek(tmp_path / "a.ckpt")
    assert {tensor.bytes for tensor in found.tensors} == {12, 20, 8}
    assert sum(found.keys.values()) == 40
    assert found.tree().bytes == 40
    parts = [torch.ones(2), torch.ones(3)]
    torch.save(torch.nested.nested_tensor(parts, layout=torch.jagged), tmp_path / "b.ckpt")
    assert peek(tmp_path / "b.ckpt").tree().bytes == 4 * 5 + 8 * 3


class Container:
    """Of a module that the reader need not have."""


def test_peek_of_every_format(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    (tmp_path / "legacy").write_bytes(
        as_bytes(model.state_dict(), _use_new_zipfile_serialization=False)
    )
    save(model.state_dict(), tmp_path / "a.safetensors")
    torch.save(torch.ones(5), tmp_path / "tensor")
    torch.save(model, tmp_path / "module")
    torch.save(odd_checkpoint(), tmp_path / "odd")
    torch.save([1, "a"], tmp_path / "nothing")
    expected = {
        "legacy": ("torch legacy", "before 1.6, or in its format", ["0.weight", "0.bias"]),
        "a.safetensors": ("safetensors", None, ["0.weight", "0.bias"]),
        "tensor": ("torch zip", WRITER, [""]),
        "module": ("torch zip", WRITER, ["0.weight", "0.bias"]),
        "nothing": ("torch zip", WRITER, []),
    }
    for name, (kind, version, names) in expected.items():
        found = peek(tmp_path / name)
        assert (found.format, found.torch) == (kind, version)
        assert [tensor.name for tensor in found.tensors] == names
        assert kind in repr(found)
    assert len(peek(tmp_path / "odd").tensors) > 5


def stripped(data: bytes, *without: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            if not name.endswith(without):
                new.writestr(name, old.read(name))
    return out.getvalue()


def test_the_layout_tells_which_torch(tmp_path: Path) -> None:
    data = stripped(as_bytes({"w": torch.ones(1)}), ".format_version", ".storage_alignment")
    (tmp_path / "a").write_bytes(data)
    assert peek(tmp_path / "a").torch == "2.1 or later"
    (tmp_path / "a").write_bytes(stripped(data, "byteorder"))
    assert peek(tmp_path / "a").torch == "1.6 or later"
    for noted in ("2.5.1", {"version": "2.5.1"}):
        told = {"provenance_training": {"module_versions": {"torch": noted}}}
        (tmp_path / "a").write_bytes(with_metadata(data, told))
        assert peek(tmp_path / "a").torch == "2.5.1"
    (tmp_path / "a").write_bytes(with_metadata(data, {"provenance_training": "?"}))
    assert peek(tmp_path / "a").torch == "2.1 or later"


@needs.with_crc32_options
def test_checkpoints_without_checksums_are_named(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "a")
    finally:
        torch.serialization.set_crc32_options(before)
    assert peek(tmp_path / "a").checked is False
    assert "no checksums in it" in repr(peek(tmp_path / "a"))
    assert_same(load(tmp_path / "a"), {"w": torch.ones(3)})


# ── metadata ──────────────────────────────────────────────────────────────────────────────────


def with_metadata(
    data: bytes, told: Any, name: str = "archive/anemoi-metadata/anemoi.json", **more: bytes
) -> bytes:
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(name, told if isinstance(told, bytes) else json.dumps(told))
        for path, content in more.items():
            archive.writestr(f"archive/anemoi-metadata/{path}.numpy", content)
    return out.getvalue()


def entry(name: str, array: Any) -> dict[str, Any]:
    path = f"archive/anemoi-metadata/{name}.numpy"
    return {"path": path, "shape": list(array.shape), "dtype": str(array.dtype)}


LAT = np.linspace(-90, 90, 50_000)
MASK = np.array([[True, False], [False, True]])
NONE = np.zeros((0, 3), np.float32)
TOLD = {
    "version": "1.0",
    "supporting_arrays_paths": {
        "data": {"mask": entry("mask", MASK), "none": entry("none", NONE)},
        "lat": entry("lat", LAT),
    },
}


def anemoi_bytes(checkpoint: Any) -> bytes:
    arrays = {"mask": MASK.tobytes(), "none": b"", "lat": LAT.tobytes()}
    return with_metadata(as_bytes(checkpoint), TOLD, **arrays)


def test_metadata_and_arrays_from_all_places(place: Any) -> None:
    data = anemoi_bytes({"w": torch.ones(1_000_000)})
    uri = place.put("a.ckpt", data)
    assert metadata(uri) == TOLD
    if place.server is not None:
        place.server.reset()
    told, arrays = metadata(uri, arrays=True)
    assert told == TOLD
    assert np.array_equal(arrays["data"]["mask"], MASK)
    assert arrays["data"]["none"].shape == (0, 3)
    assert np.array_equal(arrays["lat"], LAT)
    if place.server is not None:
        assert place.server.bytes_sent < len(data) / 4


def test_metadata_under_its_older_name_in_any_folder(tmp_path: Path) -> None:
    data = with_metadata(as_bytes({}), {"version": "0"}, "inference/ai-models.json")
    (tmp_path / "a").write_bytes(data)
    assert metadata(tmp_path / "a") == {"version": "0"}
    assert metadata(tmp_path / "a", arrays=True) == ({"version": "0"}, {})


def test_metadata_that_is_not_there_or_not_right(tmp_path: Path) -> None:
    plain = as_bytes({"w": torch.ones(1)})
    missing = {"supporting_arrays_paths": {"x": entry("gone", MASK)}}
    wrong = {"supporting_arrays_paths": {"x": {**entry("x", MASK), "dtype": "object"}}}
    odd = {"supporting_arrays_paths": [1]}
    cases: list[tuple[bytes, type[CheckpointError], str]] = [
        (plain, CheckpointNotFoundError, r"no anemoi\.json in it; anemoi\.utils"),
        (
            with_metadata(with_metadata(plain, {}), {}, "archive/b/anemoi.json"),
            CorruptError,
            "2 rec",
        ),
        (with_metadata(plain, b"{"), CorruptError, r"its archive/.*anemoi\.json cannot be read"),
        (with_metadata(plain, b"[" * 100_000), CorruptError, "nested without end"),
        (with_metadata(plain, missing), CorruptError, r"the array .*gone\.numpy is missing"),
        (
            with_metadata(plain, wrong, x=MASK.tobytes()),
            CorruptError,
            "arrays_paths cannot be read",
        ),
        (with_metadata(plain, odd), CorruptError, "arrays_paths cannot be read"),
    ]
    for data, kind, said in cases:
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(kind, match=said):
            metadata(tmp_path / "a", arrays=True)
    save({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="no anemoi"):
        metadata(tmp_path / "a.safetensors")


# ── save ──────────────────────────────────────────────────────────────────────────────────────


def test_what_is_saved_loads_again_from_all_places(place: Any, tmp_path: Path) -> None:
    checkpoint = load(lightning_checkpoint(tmp_path), drop_optimizer)
    uri = place.put("out.ckpt", b"what was there before")
    if place.kind == "http":
        with pytest.raises(InvalidURIError, match="cannot be written to"):
            save(checkpoint, uri)
        return
    assert str(save(checkpoint, uri)) == uri
    assert_same(load(uri), checkpoint)


def test_inert_objects_are_saved_as_what_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(anemoi_bytes(training()))
    checkpoint = load(tmp_path / "a.ckpt", drop_optimizer)
    assert isinstance(checkpoint["hyper_parameters"]["own"], Inert)
    save(checkpoint, tmp_path / "b.ckpt", metadata=tmp_path / "a.ckpt")
    real = torch.load(tmp_path / "b.ckpt", weights_only=False)
    own = real["hyper_parameters"]["own"]
    assert type(own) is Own
    assert own.twin is own
    assert torch.equal(own.scale, torch.full((2,), 3.0))
    assert "optimizer_states" not in real
    told, arrays = metadata(tmp_path / "b.ckpt", arrays=True)
    assert told == TOLD
    assert np.array_equal(arrays["lat"], LAT)
    assert np.array_equal(arrays["data"]["mask"], MASK)
    torch.save({}, tmp_path / "plain.ckpt")
    save(checkpoint, tmp_path / "c.ckpt", metadata=tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointNotFoundError):
        metadata(tmp_path / "c.ckpt")


def test_safetensors_by_name(tmp_path: Path) -> None:
    state = {
        "conj": torch.ones(3, dtype=torch.complex64).conj() * 1j,
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.ones(0, 2),
        "one": torch.tensor(4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    save(state, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert list(again) == list(state)
    assert all(torch.equal(again[name], value) for name, value in state.items())
    assert all(again[name].dtype == value.dtype for name, value in state.items())
    save(state, tmp_path / "a.safetensors.gz")
    assert (tmp_path / "a.safetensors.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert load(tmp_path / "a.safetensors.gz").keys() == state.keys()


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ({"state_dict": {}, "epoch": 3}, "holds no dict such as state_dict; save the weights"),
        ({"q": torch.ones(1, dtype=torch.complex128)}, "holds no torch.complex128 such as q"),
        ([1], "tensors by name, not a list"),
    ],
)
def test_what_safetensors_cannot_hold(tmp_path: Path, checkpoint: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        save(checkpoint, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"before")
    with pytest.raises(CheckpointError, match=r"a\.ckpt: the checkpoint cannot be written"):
        save({"a": lambda: None}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="it cannot be written"):
        save({}, tmp_path / "missing" / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


# ── command line ──────────────────────────────────────────────────────────────────────────────


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anemoi_ckpt", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COVERAGE_PROCESS_START": ""}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_line_in_a_shell(tmp_path: Path) -> None:
    (tmp_path / "strategies.py").write_text("raise SystemExit('a user has such a file, too')")
    (tmp_path / "a.ckpt").write_bytes(as_bytes(training()))
    done = run("peek", "a.ckpt", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "weights 40 kB · optimizer 80 kB" in done.stdout
    done = run("copy", "a.ckpt", "w.safetensors", "--cast", "bfloat16", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "w.safetensors\n", "")
    assert load(tmp_path / "w.safetensors")["a.weight"].dtype is torch.bfloat16
    done = run("peek", "b.ckpt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == "anemoi-ckpt: b.ckpt: there is no such file; is it one of these: a.ckpt?\n"
    )


def test_copying_what_is_wanted(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.ckpt").write_bytes(anemoi_bytes(training()))
    source, to = str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")
    assert main(["copy", source, to, "--include", "a.*", "--exclude", "*.bias"]) == 0
    assert list(load(to, weights)) == ["a.weight"]
    assert load(to)["epoch"] == 3
    assert metadata(to) == TOLD
    assert main(["copy", source, to, "--weights"]) == 0
    assert list(load(to)) == ["a.weight", "tied", "a.bias"]
    (tmp_path / "folder").mkdir()
    assert main(["copy", source, str(tmp_path / "folder")]) == 0
    assert (tmp_path / "folder" / "a.ckpt").read_bytes() == (tmp_path / "a.ckpt").read_bytes()
    assert capsys.readouterr().out.endswith("folder/a.ckpt\n")
    assert main(["metadata", source]) == 0
    assert json.loads(capsys.readouterr().out) == TOLD


def test_copying_to_all_places(place: Any, tmp_path: Path, capsys: Any) -> None:
    if place.kind == "http":
        pytest.skip("nothing writes over HTTP")
    (tmp_path / "a.ckpt").write_bytes(data := as_bytes(training()))
    uri = place.put("b.ckpt", b"")
    assert main(["copy", str(tmp_path / "a.ckpt"), uri]) == 0
    assert main(["copy", uri, str(tmp_path / "c.ckpt")]) == 0
    assert (tmp_path / "c.ckpt").read_bytes() == data


@pytest.mark.parametrize("ranged", [True, False])
def test_copying_from_one_place_to_another(
    http_server: servers.HTTPServer, s3: servers.Store, ranged: bool
) -> None:
    data = as_bytes(training())
    uri = http_server.put("a.ckpt", data)
    if ranged:  # gone on with, where it broke off
        http_server.faults.append(None)
        http_server.faults.append(servers.Fault(cut=100))
    else:
        http_server.fault = lambda request: servers.Fault(ignore_range=True)
    assert main(["copy", uri, s3.uri("copied.ckpt")]) == 0
    assert s3.sdk.get_object(Bucket=servers.BUCKET, Key="copied.ckpt")["Body"].read() == data


def test_errors_of_the_command_line_are_one_line(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "a.ckpt")
    source = str(tmp_path / "a.ckpt")
    for arguments, said in {
        ("metadata", source): "no anemoi.json in it",
        ("copy", source, "b.ckpt", "--cast", "float7"): "--cast takes a dtype of torch",
        ("copy", source, "b.ckpt", "--include", "x*"): "x*",
        ("peek", "https://user:secret@127.0.0.1:1/a?sig=s3cr3t"): "sig=***",
    }.items():
        monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
        assert main(arguments) == 1
        shown = capsys.readouterr()
        assert said in shown.err
        assert shown.err.startswith("anemoi-ckpt: ")
        assert shown.err.count("\n") == 1
        assert "s3cr3t" not in shown.err
        assert shown.out == ""
    with pytest.raises(SystemExit) as caught:
        main(["unknown"])
    assert caught.value.code == 2
    monkeypatch.setattr(
        anemoi_ckpt, "peek", lambda uri, **_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert main(["peek", source]) == 130
