"""How two checkpoints differ, told without their tensors."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import servers
import strategies as s
from anemoi_ckpt import CheckpointError, diff, load, load_into, save
from checkpoints import as_bytes, lightning_checkpoint
from conftest import Place

SIZE = 200_000


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"{part}.{i}.weight" for part in ("encoder", "decoder") for i in range(3)]
    return {name: torch.randn(SIZE, generator=generator) for name in names}


def checkpoint(seed: int = 0, **weights: torch.Tensor) -> dict[str, Any]:
    return {"state_dict": {**state(seed), **weights}, "epoch": 3, "hyper_parameters": {"lr": 0.1}}


def test_what_differs_is_told_without_a_tensor(place: Place) -> None:
    a = checkpoint(old=torch.ones(3), same=torch.ones(4), bent=torch.ones(2, 3))
    b = checkpoint(new=torch.ones(3), same=torch.ones(4), bent=torch.ones(3, 2))
    b["state_dict"]["decoder.1.weight"] = a["state_dict"]["decoder.1.weight"].clone()
    b["state_dict"]["decoder.1.weight"][SIZE - 1] += 1e-6
    b["epoch"], b["hyper_parameters"] = 4, {"lr": 0.2, "nested": {"deep": [1, 2]}}
    one, other = place.put("a.ckpt", as_bytes(a)), place.put("b.ckpt", as_bytes(b))
    before = place.server.bytes_sent if place.server else 0
    found = diff(one, other)
    if place.server:
        assert place.server.bytes_sent - before < 600_000
    assert found
    assert not found.same
    assert found.changed == ("decoder.1.weight",)
    assert found.added == ("new",)
    assert found.gone == ("old",)
    assert set(found.equal) == set(state()) - {"decoder.1.weight"} | {"same"}
    assert found.undecided == ()
    assert found.reshaped == {"bent": (((2, 3), torch.float32), ((3, 2), torch.float32))}
    assert found.entries == {
        "epoch": ("3", "4"),
        "hyper_parameters.lr": ("0.1", "0.2"),
        "hyper_parameters.nested.deep.0": ("nothing", "1"),
        "hyper_parameters.nested.deep.1": ("nothing", "2"),
    }
    assert found.bytes_moved <= 4 * 64 * 1024 * 2
    text = repr(found)
    for line in (
        "they differ",
        "bent: (2, 3) float32 → (3, 2) float32",
        "epoch: 3 → 4",
        "new",
        "old",
    ):
        assert line in text


def test_the_same_checkpoint_twice(tmp_path: Path) -> None:
    path = lightning_checkpoint(tmp_path)
    again = save(load(path), tmp_path / "again.ckpt")
    found = diff(path, path)
    assert found.same
    assert not found
    assert len(found.equal) > 4
    assert any("optimizer_states" in name for name in found.equal)
    assert repr(found).endswith("the same")
    assert diff(path, again).same  # written anew, by us


def test_did_the_frozen_encoder_stay_frozen(tmp_path: Path) -> None:
    a, b = checkpoint(), checkpoint()
    b["state_dict"] |= {name: each for name, each in state(1).items() if "decoder" in name}
    b["epoch"] = 9
    for name, each in (("a", a), ("b", b)):
        save(each, tmp_path / f"{name}.ckpt", metadata={"run_id": name})
    one, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    assert diff(one, other, s.weights, s.include("encoder")).same
    assert not diff(one, other, s.weights, s.include("decoder")).same
    assert diff(one, other, s.include("encoder")).entries == {
        "epoch": ("3", "9"),
        "metadata.run_id": ("'a'", "'b'"),
    }

    def finite(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # asks for values
        return {name: each for name, each in state_dict.items() if each.isfinite().all()}

    assert diff(one, other, s.weights, s.include("encoder"), finite).same


def test_how_far_they_are_apart(http_server: servers.HTTPServer) -> None:
    a, b = state(), state()
    b["encoder.0.weight"] = a["encoder.0.weight"] + 0.5
    b["decoder.2.weight"] = 2 * a["decoder.2.weight"]
    one, other = (http_server.put(n, as_bytes(each)) for n, each in (("a", a), ("b", b)))
    before = http_server.bytes_sent
    found = diff(one, other, values=True)
    moved = http_server.bytes_sent - before
    assert 4 * 4 * SIZE < moved < 4 * 4 * SIZE + 2_500_000  # two tensors of each
    near = found.norms["encoder.0.weight"]
    assert near.max == pytest.approx(0.5, abs=1e-6)
    assert near.mean == pytest.approx(0.5, abs=1e-6)
    assert near.relative == pytest.approx(0.5, rel=0.02)  # of values of norm one each
    assert found.norms["decoder.2.weight"].relative == pytest.approx(1)
    assert found.changed == ("encoder.0.weight", "decoder.2.weight")
    lines = repr(found).splitlines()
    (first,) = [line for line in lines if line.startswith("changed 2")]
    assert "decoder.2.weight  max" in first  # the farthest
    assert json.loads(json.dumps(found.as_dict()))["norms"]["encoder.0.weight"]["max"] == near.max
    assert repr(pickle.loads(pickle.dumps(found))) == repr(found)


def test_many_values_are_compared_some_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("_anemoi_ckpt.differing.BATCH_BYTES", 3 * 4 * SIZE)
    save(state(0), tmp_path / "a.ckpt")
    save(state(1), tmp_path / "b.ckpt")
    found = diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt", values=True)
    assert set(found.norms) == set(state())
    assert all(1.3 < each.relative < 1.5 for each in found.norms.values())


SAFETENSORS: list[tuple[str, Callable[[Any], bytes]]] = [
    ("a.safetensors", safetensors.torch.save),
    ("a.ckpt", lambda weights: as_bytes(weights, _use_new_zipfile_serialization=False)),
]


@pytest.mark.parametrize(("name", "written"), SAFETENSORS)
def test_formats_without_checksums(
    name: str, written: Callable[[Any], bytes], tmp_path: Path
) -> None:
    weights = state()
    (tmp_path / name).write_bytes(written(weights))
    weights["decoder.0.weight"] = weights["decoder.0.weight"] * 2
    save(weights, tmp_path / "b.ckpt")
    found = diff(tmp_path / name, tmp_path / "b.ckpt")
    assert set(found.undecided) == set(weights)
    assert (found.same, bool(found)) == (False, True)
    assert "values=True fetches them" in repr(found)
    found = diff(tmp_path / name, tmp_path / "b.ckpt", values=True)
    assert found.changed == ("decoder.0.weight",)
    assert len(found.equal) == len(weights) - 1
    assert found.undecided == ()


def test_a_model_is_compared_by_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    path = save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "a.ckpt")
    assert diff(path, model).same
    assert diff(model, path).same
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    found = diff(path, model, values=True)
    assert found.changed == ("0.weight",)
    assert found.norms["0.weight"].max == pytest.approx(1)
    assert found.b == "Sequential"
    load_into(model, path)
    assert diff(path, model.state_dict()).same
    assert diff(load(path), load(path)).same
    assert diff(load(path), {"state_dict": model.state_dict(), "epoch": 4}).same  # both are partial


def test_layouts_are_looked_at(tmp_path: Path) -> None:
    """The same bytes, read in another order, are other values; a part of a record has no CRC."""
    base = torch.arange(12.0).reshape(3, 4)
    a = {"t": base.t(), "part": torch.arange(20.0)[5:9], "off": torch.arange(20.0)[5:9]}
    torch.save(a, tmp_path / "a.ckpt")
    square = torch.arange(12.0).reshape(4, 3)
    torch.save({**a, "t": square, "off": torch.arange(20.0)[6:10]}, tmp_path / "b.ckpt")
    found = diff(tmp_path / "a.ckpt", tmp_path / "a.ckpt")
    assert found.same
    found = diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert (found.equal, found.undecided) == (("part",), ("t", "off"))
    found = diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt", values=True)
    assert found.changed == ("t", "off")
    assert diff(tmp_path / "a.ckpt", a, values=True).same


def test_odd_tensors(tmp_path: Path) -> None:
    weights = {
        "sparse": torch.eye(3).to_sparse(),
        "nan": torch.tensor([float("nan"), 1.0]),
        "flag": torch.tensor(True),
        "none": torch.ones(0),
        "conj": torch.tensor([1 + 2j]).conj(),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    torch.save(weights, tmp_path / "a.ckpt")
    torch.save({**weights, "sparse": 2 * torch.eye(3).to_sparse()}, tmp_path / "b.ckpt")
    found = diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert set(found.undecided) <= {"sparse", "conj"}
    found = diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt", values=True)
    assert found.changed == ("sparse",)
    assert found.norms["sparse"].max == 1
    complex_ones = {"c": torch.tensor([3 + 4j]), "zero": torch.zeros(2)}
    found = diff(complex_ones, {"c": torch.tensor([0j]), "zero": torch.ones(2)}, values=True)
    assert found.norms["c"].max == pytest.approx(5)
    assert found.norms["zero"].relative == float("inf")


@pytest.mark.filterwarnings("ignore:.*quantized tensor")
def test_quantized_tensors(tmp_path: Path) -> None:
    for name, values in (("a", [0.0, 1.0]), ("b", [0.0, 2.0])):
        quantized = torch.quantize_per_tensor(torch.tensor(values), 0.1, 3, torch.qint8)
        torch.save({"q": quantized, "w": torch.ones(3)}, tmp_path / f"{name}.ckpt")
    assert "q" not in diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt").equal
    found = diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt", values=True)
    assert (found.changed, found.equal) == (("q",), ("w",))


def test_what_a_strategy_writes_into_is_undecided(tmp_path: Path) -> None:
    save({"w": torch.ones(3), "v": torch.ones(3)}, tmp_path / "a.ckpt")

    def doubled(found: Any) -> Any:
        found["w"].mul_(2)
        return {**found, "v": found["v"] * 2}

    assert set(diff(tmp_path / "a.ckpt", tmp_path / "a.ckpt", doubled).undecided) == {"w", "v"}
    assert diff(tmp_path / "a.ckpt", tmp_path / "a.ckpt", doubled, values=True).same


def test_a_strategy_that_asks_for_values(tmp_path: Path) -> None:
    save({"w": torch.ones(3), "n": torch.tensor(2)}, tmp_path / "a.ckpt")

    def scaled(found: Any) -> Any:
        return {"w": found["w"] * found["n"].item()}

    assert diff(tmp_path / "a.ckpt", {"w": 2 * torch.ones(3)}, scaled_once(scaled)).changed == ()


def scaled_once(strategy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of the side that has the factor alone."""
    return lambda found: strategy(found) if "n" in found else found


def test_another_byte_order(tmp_path: Path) -> None:
    """Its records' bytes are not the values as this machine has them."""
    weights = {"w": torch.arange(9.0)}
    swapped = {"w": weights["w"].clone()}
    swapped["w"].untyped_storage().byteswap(torch.float32)
    path = tmp_path / "big.ckpt"
    with zipfile.ZipFile(io.BytesIO(as_bytes(swapped))) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            is_order = info.filename.endswith("byteorder")
            new.writestr(info.filename, b"big" if is_order else old.read(info))
    save(weights, tmp_path / "little.ckpt")
    assert diff(path, tmp_path / "little.ckpt").undecided == ("w",)
    assert diff(path, tmp_path / "little.ckpt", values=True).same
    assert diff(path, path).same


def test_metadata_are_compared_as_a_tree(tmp_path: Path) -> None:
    for name, run in (("a", "x"), ("b", "y")):
        metadata = {"run_id": run, "config": {"data": {"resolution": "o96"}}}
        save({"w": torch.ones(2)}, tmp_path / f"{name}.ckpt", metadata=metadata)
    found = diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert found.entries == {"metadata.run_id": ("'x'", "'y'")}
    assert found.equal == ("w",)


def test_entries_of_other_types(tmp_path: Path) -> None:
    """Inert objects and arrays are compared by what they hold."""
    for name, rate in (("a", 0.1), ("b", 0.1), ("c", 0.2)):
        held = Settings(rate)
        torch.save({"w": torch.ones(2), "held": held, "at": rate}, tmp_path / f"{name}.ckpt")
    assert diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt").same
    found = diff(tmp_path / "a.ckpt", tmp_path / "c.ckpt")
    assert "at" in found.entries
    assert any(name.startswith("held") for name in found.entries)
    assert diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt", trust=[Settings]).same


class Settings:
    """As it prints, it shows where it is in memory."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


def test_long_entries_are_cut_and_secrets_hidden(tmp_path: Path) -> None:
    save({"w": torch.ones(2), "path": "s3://b/k?sig=c2VjcmV0"}, tmp_path / "a.ckpt")
    save({"w": torch.ones(2), "path": "x" * 100, "nan": float("nan")}, tmp_path / "b.ckpt")
    found = diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    old, new = found.entries["path"]
    assert "c2VjcmV0" not in old
    assert len(new) == 40
    assert new.endswith("…")
    assert diff(tmp_path / "b.ckpt", tmp_path / "b.ckpt").same


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError):
        diff(path, tmp_path / "none.ckpt")
    with pytest.raises(TypeError):
        diff(path, path, s.include)
    with pytest.raises(TypeError):
        diff(path, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        diff(path)  # type: ignore[call-arg]


def test_checkpoints_without_tensors(tmp_path: Path) -> None:
    for number, held in enumerate([{"epoch": 3}, [1, {"a": "b"}], "text", None]):
        torch.save(held, tmp_path / "a.ckpt")
        torch.save([held, number], tmp_path / "b.ckpt")
        for values in (False, True):
            same = diff(tmp_path / "a.ckpt", tmp_path / "a.ckpt", values=values)
            assert same.same
            assert "equal    0 tensors" in repr(same)
            assert "the same" in same._repr_html_()
            other = diff(tmp_path / "a.ckpt", tmp_path / "b.ckpt", values=values)
            assert other
            assert "they differ" in repr(other)
            assert "they differ" in other._repr_html_()


def test_tensors_without_values(tmp_path: Path) -> None:
    """Some were saved on the meta device: nothing of two of these differs."""
    a = {"lost": torch.ones(2, device="meta"), "kept": torch.ones(2, device="meta")}
    b = {"lost": torch.ones(2), "kept": torch.ones(2, device="meta")}
    one, other = save(a, tmp_path / "a.ckpt"), save(b, tmp_path / "b.ckpt")
    for sides in ((one, other), (other, one), (a, other), (one, b)):
        found = diff(*sides, values=True)
        assert (found.equal, found.changed, found.norms) == (("kept",), ("lost",), {})
        assert "changed 1  lost" in repr(found)
