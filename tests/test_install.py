"""`load_into`: what goes into a model, what does not, and what is said of it."""

import copy
import functools
import pickle
import re
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import servers
from _anemoi_ckpt.tables import folded
from anemoi_ckpt import CorruptError, MismatchError, Report, download, load, load_into
from checkpoints import as_bytes, assert_same, lightning_checkpoint, quiet_trainer
from strategies import compose, drop_optimizer, filter_shapes, keep_progress, weights


class Tied(nn.Module):
    """Two names for one parameter, a buffer, and a part of its own."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, width)
        self.decoder = nn.Linear(4, width)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("mean", torch.zeros(4))


def pre_hook(module: nn.Module, hook: Any) -> None:
    """As `register_load_state_dict_pre_hook`, which is public since torch 2.5."""
    module._register_load_state_dict_pre_hook(hook, with_module=True)


def train(model: nn.Module, steps: int = 2) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p**2).sum() for p in model.parameters()).backward()
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    model = Tied()
    model.mean += 7
    optimizer, scheduler = train(model)
    return {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "hyper_parameters": {"width": 3},
    }


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ── what goes in ──────────────────────────────────────────────────────────────────────────────


def test_weights_go_into_a_model_from_all_places(place, checkpoint, tmp_path: Path) -> None:
    model = Tied()
    data = as_bytes(checkpoint)
    uri = place.put("a.ckpt", data)
    report = load_into(model, uri)
    assert_same(dict(model.state_dict()), dict(checkpoint["state_dict"]))
    assert report.place == uri
    assert report.loaded == tuple(model.state_dict())
    assert (report.missing, report.unexpected, report.restored) == ((), (), ())
    assert (dict(report.mismatched), dict(report.renamed)) == ({}, {})
    assert report.rest == {"epoch": 3, "hyper_parameters": {"width": 3}}
    assert report.bytes_stored == len(data)
    assert 0 < report.bytes_moved <= 3 * len(data)  # a small file is its first and last block, too
    assert report.seconds > 0
    moved = repr(report).splitlines()[1]
    assert re.fullmatch(r"moved         [\d.]+ kB of [\d.]+ kB in \d+\.\d\d s", moved)


def test_only_what_fits_is_moved(http_server: servers.HTTPServer) -> None:
    state = {f"{i}.weight": torch.randn(500, 500) for i in range(10)}
    moments = {i: {"exp_avg": t + 1} for i, t in enumerate(state.values())}
    uri = http_server.put("a.ckpt", as_bytes({"state_dict": state, "optimizer_states": [moments]}))
    model = nn.Sequential(*(nn.Linear(500, 500, bias=False) for _ in range(3)))
    report = load_into(model, uri)
    assert report.bytes_moved == http_server.bytes_sent < 3 * 1e6 * 1.02 + 1024**2
    assert report.unexpected == tuple(f"{i}.weight" for i in range(3, 10))
    assert torch.equal(model[2].weight, state["2.weight"])


def test_a_server_without_ranges_moves_all(http_server, checkpoint) -> None:
    data = as_bytes(checkpoint)
    http_server.fault = lambda request: servers.Fault(ignore_range=True)
    report = load_into(Tied(), http_server.put("a.ckpt", data))
    assert (report.bytes_moved, report.bytes_stored) == (len(data), len(data))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_keeps_dtypes_and_ties_and_gradients(checkpoint, device, dtype) -> None:
    with torch.device(device):
        model = Tied().to(dtype)
    model.decoder.bias.requires_grad_(False)
    parameter = model.encoder.weight
    load_into(model, checkpoint)
    assert model.encoder.weight is model.decoder.weight
    assert (model.encoder.weight is parameter) == (device == "cpu")
    assert not model.decoder.bias.requires_grad
    assert model.encoder.weight.requires_grad
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, checkpoint["state_dict"][name].to(dtype))


def test_a_model_that_is_half_on_meta(checkpoint) -> None:
    model = Tied()
    model.decoder.bias = nn.Parameter(torch.empty(3, device="meta"))
    load_into(model, checkpoint)
    assert_same(dict(model.state_dict()), dict(checkpoint["state_dict"]))


def test_one_of_tied_names_fills_both(checkpoint) -> None:
    del checkpoint["state_dict"]["decoder.weight"]
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Tied()
        report = load_into(model, checkpoint)
        assert report.missing == ()
        assert torch.equal(model.decoder.weight, checkpoint["state_dict"]["encoder.weight"])


def test_lazy_modules_and_extra_state() -> None:
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(self.count)  # of any shape

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.count = len(state)

    source = Counting(4, 3)
    source.count = 5
    model = Counting(4, 3)
    load_into(model, source.state_dict())
    assert model.count == 5
    lazy = nn.LazyLinear(3)
    report = load_into(lazy, nn.Linear(4, 3).state_dict(), require=1.0)
    assert lazy.weight.shape == (3, 4)
    assert report.loaded == ("weight", "bias")


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s, lambda s: {"model": s}, lambda s: {"a": {}, "model": {"state_dict": s, "n": 1}}],
)
def test_weights_are_found_wherever_they_are(wrap) -> None:
    source, model = nn.Linear(4, 3), nn.Linear(4, 3)
    report = load_into(model, wrap(source.state_dict()))
    assert_same(dict(model.state_dict()), dict(source.state_dict()))
    assert report.rest in ({}, {"a": {}, "model": {"n": 1}})


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"w": torch.ones(1)},
        {"state_dict": {"w": torch.ones(1)}, "model": {"v": torch.ones(1)}},
        {"module": {"model_state_dict": {"w": torch.ones(1)}}, "epoch": 3},
        {"model": torch.ones(1), "b": torch.ones(2)},
        {"model": nn.Linear(1, 1)},
    ],
)
def test_weights_are_where_the_strategy_of_that_name_finds_them(checkpoint) -> None:
    model = nn.Module()
    for name, value in weights(checkpoint).items():
        model.register_buffer(name, torch.zeros_like(value))
    assert load_into(model, checkpoint).loaded == tuple(weights(checkpoint))
    assert_same(dict(model.state_dict()), {k: v.detach() for k, v in weights(checkpoint).items()})


def test_a_whole_module_as_a_checkpoint() -> None:
    source, model = nn.Linear(4, 3), nn.Linear(4, 3)
    load_into(model, {"model": source})
    assert torch.equal(model.weight, source.weight)


def test_compose_with_a_model_bound(checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(as_bytes(checkpoint))
    report = compose(drop_optimizer, functools.partial(load_into, Tied()))(tmp_path / "a.ckpt")
    assert isinstance(report, Report)
    assert len(report.loaded) == 5


# ── memory ────────────────────────────────────────────────────────────────────────────────────


class Pair(nn.Module):
    """Two parameters of one shape, and a buffer, on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(2, 3, device="meta"))
        self.b = nn.Parameter(torch.empty(2, 3, device="meta"))
        self.register_buffer("c", torch.empty(3, device="meta"))


WHOLE = torch.arange(9.0)
ONE = nn.Parameter(torch.ones(2, 3))


@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.ones(2, 3), "b": nn.Parameter(torch.ones(2, 3)), "c": torch.ones(3)},
        {"a": ONE, "b": ONE, "c": ONE.detach()[1]},
        {"a": WHOLE[:6].view(2, 3), "b": WHOLE[3:].view(2, 3), "c": WHOLE[6:]},
        {"a": torch.ones(1, 3).expand(2, 3), "b": torch.ones(2, 3), "c": torch.ones(1).expand(3)},
    ],
    ids=["plain", "tied", "views", "expanded"],
)
@pytest.mark.parametrize("stored", [False, True])
def test_a_filled_model_shares_no_memory(state, stored: bool, tmp_path: Path) -> None:
    before = copy.deepcopy({name: tensor.detach() for name, tensor in state.items()})
    model = Pair()
    if stored:
        torch.save(state, tmp_path / "a.ckpt")
    load_into(model, tmp_path / "a.ckpt" if stored else {"state_dict": state})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        tensor.fill_(float(ord(name)))
    for name, tensor in model.state_dict().items():
        assert (tensor == ord(name)).all()
        assert torch.equal(state[name], before[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # and keeps none of another


def test_a_filled_model_shares_no_memory_with_the_rest_or_an_array(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    torch.save({"state_dict": state, "ema": state}, tmp_path / "a.ckpt")
    array = np.zeros(2, dtype=np.float32)
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    report = load_into(
        model,
        tmp_path / "a.ckpt",
        lambda c: {**c, "state_dict": {**c["state_dict"], "bias": torch.from_numpy(array)}},
    )
    model.state_dict()["weight"].zero_()
    model.state_dict()["bias"].fill_(1)
    assert_same(dict(report.rest["ema"]), dict(state))
    assert array.tolist() == [0, 0]


@pytest.mark.skipif(
    not (hasattr(torch._C, "_storage_Use_Count") and hasattr(torch.UntypedStorage, "resizable")),
    reason="this torch does not tell who shares a storage: there it is copied",
)
def test_what_was_fetched_is_not_copied_again(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2, bias=False).state_dict(), tmp_path / "a.ckpt")
    fetched: list[int] = []

    def note(checkpoint: Any) -> Any:
        fetched.append(checkpoint["weight"].untyped_storage()._cdata)
        return checkpoint

    with torch.device("meta"):
        model = nn.Linear(3, 2, bias=False)
    load_into(model, tmp_path / "a.ckpt", note)
    assert model.weight.untyped_storage()._cdata == fetched[-1]


def test_a_sparse_tensor_fills_a_sparse_one() -> None:
    given = torch.eye(3).to_sparse()
    model = nn.Module()
    model.register_buffer("edges", given.to("meta"))
    load_into(model, {"edges": given})
    model.edges._values().zero_()
    assert torch.equal(given.to_dense(), torch.eye(3))


# ── optimizers and schedulers ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", ["lightning", "own", "objects in lists"])
def test_optimizer_and_scheduler_take_their_states(checkpoint, form: str) -> None:
    if form == "own":
        checkpoint["optimizer_state_dict"] = checkpoint.pop("optimizer_states")[0]
        checkpoint["scheduler_state_dict"] = checkpoint.pop("lr_schedulers")[0]
    model = Tied()
    optimizer, scheduler = train(model, 1)
    lists = form == "objects in lists"
    report = load_into(
        model,
        checkpoint,
        optimizer=[optimizer] if lists else optimizer,
        scheduler=(scheduler,) if lists else scheduler,
    )
    assert report.restored == ("optimizer", "scheduler")
    expected = checkpoint.get("optimizer_state_dict") or checkpoint["optimizer_states"][0]
    assert_same(optimizer.state_dict()["state"], expected["state"])
    assert scheduler.last_epoch == 2
    assert list(report.rest) == ["epoch", "hyper_parameters"]


def test_states_that_are_not_there_are_not_restored(checkpoint) -> None:
    model = Tied()
    optimizer, _ = train(model, 1)
    before = copy.deepcopy(optimizer.state_dict())
    report = load_into(model, checkpoint, drop_optimizer, optimizer=optimizer)
    assert report.restored == ()
    assert_same(optimizer.state_dict(), before)


def test_an_optimizer_of_a_hollow_model_is_refused(http_server, checkpoint) -> None:
    checkpoint["state_dict"]["large"] = torch.zeros(10**6)
    uri = http_server.put("a.ckpt", as_bytes(checkpoint))
    with torch.device("meta"):
        model = Tied()
    model.encoder.bias = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW(model.parameters())
    for optimizers in (optimizer, [torch.optim.SGD([model.encoder.bias]), optimizer]):
        with pytest.raises(MismatchError) as caught:
            load_into(model, uri, optimizer=optimizers)
        assert str(caught.value) == (
            f"{uri}: the optimizer was made on 2 parameters on the meta device, and load_into puts "
            "others in their place; make the optimizer after load_into"
        )
    assert model.encoder.weight.is_meta
    assert not model.encoder.bias.any()
    assert not optimizer.state
    assert http_server.bytes_sent < 10**6  # told before anything was fetched
    real = torch.optim.SGD([model.encoder.bias])  # of a parameter that stays
    assert load_into(model, uri, drop_optimizer, optimizer=real).restored == ()


def test_a_refused_state_changes_nothing(checkpoint) -> None:
    model = Tied()
    optimizer, scheduler = train(model, 1)
    before = snapshot(model), copy.deepcopy(optimizer.state_dict())
    checkpoint["lr_schedulers"] *= 2
    with pytest.raises(MismatchError, match="states of 2 schedulers, and 1 would take one; give a"):
        load_into(model, checkpoint, optimizer=optimizer, scheduler=scheduler)
    other = torch.optim.AdamW([torch.ones(1, requires_grad=True)])
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        load_into(
            model,
            {**checkpoint, "optimizer_states": checkpoint["optimizer_states"] * 2},
            optimizer=[optimizer, other],
        )
    assert_same(optimizer.state_dict(), before[1])
    assert_same(snapshot(model), before[0])


# ── as load_state_dict does ───────────────────────────────────────────────────────────────────


class Renaming(nn.Module):
    """A module whose hook knows an older name of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2)
        pre_hook(self, self.rename)

    @staticmethod
    def rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state_dict if name.startswith(f"{prefix}old.")]:
            new = f"{prefix}new.{name.removeprefix(f'{prefix}old.')}"
            state_dict[new] = state_dict.pop(name)


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: it drops a counter that it does not have."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(3))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Listed(nn.Linear):
    """A module that keeps a list in its state dict, and writes into its tensors by itself."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen: list[int] = []

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}seen"] = self.seen

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.seen = state_dict.pop(f"{prefix}seen")
        with torch.no_grad():
            self.weight.copy_(state_dict.pop(f"{prefix}weight"))
            self.bias.copy_(state_dict.pop(f"{prefix}bias"))


class Own(nn.Linear):
    """A model with methods of its own, which take fewer arguments than torch's."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override] # fewer arguments than nn.Module's are the case
        return {f"own.{name}": value for name, value in super().state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override] # fewer arguments than nn.Module's are the case
        state_dict = {name.removeprefix("own."): value for name, value in state_dict.items()}
        super().load_state_dict(state_dict, strict=False)


def observer() -> nn.Module:
    from torch.ao.quantization import FakeQuantize, PerChannelMinMaxObserver

    kinds = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
    bounds = {"quant_min": -128, "quant_max": 127}
    return FakeQuantize(observer=PerChannelMinMaxObserver, ch_axis=0, **kinds, **bounds)


def filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, tensor in enumerate((*model.parameters(), *model.buffers())):
            tensor.copy_(torch.full_like(tensor, number + 2))
    return model


def renamed_state() -> dict[str, Any]:
    state = filled(Renaming()).state_dict()
    return {name.replace("new.", "old."): value for name, value in state.items()}


def normalized() -> tuple[nn.Module, nn.Module]:
    with pytest.warns((FutureWarning, UserWarning)):
        return nn.utils.weight_norm(nn.Linear(3, 3)), nn.utils.parametrizations.weight_norm(
            nn.Linear(3, 3)
        )


def without_counter() -> dict[str, Any]:
    state = filled(nn.BatchNorm1d(3)).state_dict()
    del state["num_batches_tracked"], state._metadata
    return state


class Telling(nn.Linear):
    """A module that tells of names that are no tensors."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        pre_hook(self, self._tell)

    def _tell(self, module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing, unexpected = rest[2:4]
        missing.append(f"{prefix}codebook")
        unexpected.append(f"{prefix}table")


class Sealed(nn.Module):
    """A module that lets nobody put another parameter in the place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self).get("_parameters", {}):
            raise AttributeError(name)
        super().__setattr__(name, value)


LOADING = {
    "real values for complex weights": (
        lambda: nn.Linear(2, 2, dtype=torch.complex64),
        lambda: {"weight": torch.tensor([[1.5, -2], [0, 1e30]]), "bias": torch.tensor([1, 2])},
    ),
    "a module that is sealed": (Sealed, lambda: filled(Sealed()).state_dict()),
    "integers for floating-point weights": (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        lambda: {"0.weight": torch.tensor([[3, -1], [0, 200]]), "0.bias": torch.ones(2) > 0},
    ),
    "a hook tells of names": (Telling, lambda: filled(Telling()).state_dict()),
    "a hook renames": (Renaming, renamed_state),
    "a module drops a name": (Frozen, lambda: filled(nn.BatchNorm1d(3)).state_dict()),
    "batch norm of torch 0.4": (lambda: nn.BatchNorm1d(3), without_counter),
    "a module with a list": (Listed, lambda: {**filled(Listed()).state_dict(), "seen": [1, 2]}),
    "methods of a model's own": (Own, lambda: filled(Own()).state_dict()),
    "a scalar of torch 0.3": (
        lambda: nn.ParameterDict({"a": nn.Parameter(torch.zeros(()))}),
        lambda: {"a": torch.ones(1)},
    ),
    "one expected, one not": (
        lambda: nn.Linear(2, 2),
        lambda: {"weight": torch.ones(2, 2), "x": 1},
    ),
}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("case", LOADING)
def test_a_model_is_filled_as_by_load_state_dict(case: str, stored: bool, tmp_path: Path) -> None:
    make, state = LOADING[case]
    torch.manual_seed(0)
    expected = make()
    torch.manual_seed(0)
    model = make()
    given = state()
    torch.save(given, tmp_path / "a.ckpt")
    keys = expected.load_state_dict(copy.copy(given), **({} if case.startswith("me") else LOOSE))
    parameters = dict(model.named_parameters())
    report = load_into(model, tmp_path / "a.ckpt" if stored else given)
    assert_same(dict(model.state_dict()), dict(expected.state_dict()))
    assert {n: p for n, p in model.named_parameters() if p is not parameters[n]} == {}
    if keys is not None:
        assert report.missing == tuple(keys.missing_keys)
        assert report.unexpected == tuple(keys.unexpected_keys)


LOOSE = {"strict": False}


def test_weight_norm_of_before_torch_2_1() -> None:
    old, new = normalized()
    report = load_into(new, old.state_dict(), strict=True)
    assert (report.missing, report.unexpected) == ((), ())
    ones = torch.ones(1, 3)
    assert torch.allclose(new(ones), old(ones))


def test_observers_take_the_size_of_the_checkpoint() -> None:
    source, model = observer(), observer()
    source(torch.randn(5, 3))
    report = load_into(model, source.state_dict(), strict=True)
    assert report.missing == ()
    assert torch.equal(model.scale, source.scale)


def test_hooks_run_once_on_all_that_fits(tmp_path: Path) -> None:
    seen: list[Any] = []
    model = nn.Linear(2, 2)
    pre_hook(model, lambda module, state, *rest: seen.append(list(state)))
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append(keys.missing_keys))
    torch.save(nn.Linear(2, 2, bias=False).state_dict(), tmp_path / "a.ckpt")
    load_into(model, tmp_path / "a.ckpt")
    assert seen == [["weight"], ["bias"]]


def test_a_hook_may_excuse_what_is_missing() -> None:
    model = nn.Linear(2, 2)
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    assert load_into(model, {"weight": torch.ones(2, 2)}).missing == ()


class Kept(nn.Module):
    """Keeps a view of its weights, and what comes of them, when it has loaded: by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("sums", torch.zeros(2))
        self.register_load_state_dict_post_hook(type(self).keep)

    def keep(self, keys: Any) -> None:
        self.turned = self.linear.weight.t()
        self.inverse = torch.inverse(self.linear.weight.detach())
        self.sums.copy_(self.linear.weight.detach().sum(1))
        keys.missing_keys[:] = [name for name in keys.missing_keys if name != "sums"]


class KeptByMethod(Kept):
    """As its parent, by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._load_state_dict_post_hooks.clear()

    def load_state_dict(self, *args: Any, **kw: Any) -> Any:
        keys = super().load_state_dict(*args, **kw)
        self.keep(keys)
        return keys


@pytest.mark.parametrize("kind", [Kept, KeptByMethod])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_is_called_after_loading_sees_the_models_own_tensors(
    kind: Any, dtype: torch.dtype
) -> None:
    """It saw the checkpoint's, of another dtype, and kept views of them."""
    model, wanted = kind(), kind()
    state = {"linear.weight": 3 * torch.eye(2, dtype=dtype), "linear.bias": torch.ones(2)}
    wanted.load_state_dict(state, strict=False)
    report = load_into(model, state, strict=True)
    assert report.missing == ()
    assert model.turned.data_ptr() == model.linear.weight.data_ptr()
    assert_same(model.inverse, wanted.inverse)
    assert_same(snapshot(model), snapshot(wanted))


def test_a_layer_that_looks_at_its_weights_as_it_loads_sees_its_own() -> None:
    class Inverse(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            self.inverse = torch.inverse(self.weight.detach())
            self.turned = self.weight.t()

    model = nn.Sequential(Inverse(2, 2))
    load_into(model, {"0.weight": 2 * torch.eye(2).half(), "0.bias": torch.ones(2)})
    assert torch.equal(model[0].inverse, torch.eye(2) / 2)
    assert model[0].turned.data_ptr() == model[0].weight.data_ptr()


def test_a_refusal_after_a_module_has_kept_its_tensors() -> None:
    model = Kept()
    before = snapshot(model)
    state = {"linear.weight": torch.zeros(2, 2), "linear.bias": torch.ones(2)}  # no inverse
    with pytest.raises(MismatchError, match="singular"):
        load_into(model, state)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_recurrent_network_computes_with_what_is_trained(kind: Any, device: str) -> None:
    """It went on with the checkpoint's tensors, beside its parameters."""
    source, model = kind(2, 3), kind(2, 3, device=device)
    state = {name: value.double() for name, value in source.state_dict().items()}
    parameters = dict(model.named_parameters())
    load_into(model, state)
    steps = torch.ones(4, 1, 2)
    assert torch.equal(model(steps)[0], source(steps)[0])
    model(steps)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if device == "cpu":
        assert all(getattr(model, name) is each for name, each in parameters.items())


def test_a_refused_load_leaves_a_recurrent_network_as_it_was() -> None:
    model, steps = nn.LSTM(2, 3), torch.ones(4, 1, 2)
    before = model(steps)[0]
    checkpoint = {"state_dict": nn.LSTM(2, 3).state_dict(), "optimizer_states": [{"bad": 1}]}
    with pytest.raises(MismatchError):
        load_into(model, checkpoint, optimizer=torch.optim.AdamW(model.parameters()))
    assert torch.equal(model(steps)[0], before)


def test_of_tied_weights_that_differ_the_last_counts_as_for_torch() -> None:
    model, wanted = Tied(), Tied()
    state = {**model.state_dict(), "decoder.weight": torch.full((3, 4), 7.0)}
    state["encoder.weight"] = torch.ones(3, 4)
    wanted.load_state_dict(state)
    load_into(model, state)
    assert_same(snapshot(model), snapshot(wanted))


class TiedBetween(nn.Module):
    """A layer that stands twice, and between its places one that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(2, 2), nn.Linear(2, 2)
        self.between.weight = self.first.weight
        self.last = self.first


@pytest.mark.parametrize("left_out", ["nothing", "first"])
def test_of_a_layer_that_stands_twice_the_last_place_counts(left_out: str) -> None:
    model, wanted = TiedBetween(), TiedBetween()
    values = {"first": 1.0, "between": 2.0, "last": 3.0}
    state = {
        name: torch.full_like(tensor, values[name.partition(".")[0]])
        for name, tensor in model.state_dict().items()
        if not name.startswith(left_out)
    }
    wanted.load_state_dict(state, strict=False)
    load_into(model, state)
    assert_same(snapshot(model), snapshot(wanted))
    assert model.first.weight[0, 0] == 3


@pytest.mark.parametrize("kind", [nn.LazyBatchNorm1d, nn.LazyLinear])
def test_lazy_layers_with_buffers_are_filled(kind: Any) -> None:
    source = kind() if kind is nn.LazyBatchNorm1d else kind(4)
    source(torch.randn(5, 3))
    model = nn.Sequential(kind() if kind is nn.LazyBatchNorm1d else kind(4))
    state = {f"0.{name}": value for name, value in source.state_dict().items()}
    load_into(model, state, strict=True)
    assert_same(snapshot(model), state)


def test_a_refused_load_leaves_a_lazy_layer_lazy() -> None:
    source, model = nn.BatchNorm1d(3), nn.Sequential(nn.LazyBatchNorm1d())
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    state = {f"0.{name}": value for name, value in source.state_dict().items()}
    checkpoint = {"state_dict": state, "optimizer_states": [{"bad": 1}]}
    with pytest.raises(MismatchError):
        load_into(model, checkpoint, optimizer=optimizer)
    assert type(model[0].running_mean) is torch.nn.UninitializedBuffer
    assert isinstance(model[0].weight, torch.nn.UninitializedParameter)


def test_below_a_module_with_hooks_all_is_moved_and_elsewhere_what_fits(http_server) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(2, 2)
            self.hooked = Renaming()

    state = {f"hooked.{name}": value for name, value in renamed_state().items()}
    large = {"plain.large": torch.zeros(10**6), "hooked.large": torch.zeros(500_000)}
    uri = http_server.put("a.ckpt", as_bytes({**state, **large}))
    report = load_into(Net(), uri)
    assert set(report.unexpected) == {"plain.large", "hooked.large"}
    assert set(report.missing) == {"plain.weight", "plain.bias"}
    assert 2e6 < http_server.bytes_sent < 2e6 * 1.02 + 2**20


def test_buffers_that_stay_on_meta_are_told() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("frequencies", torch.ones(2), persistent=False)

    with torch.device("meta"):
        model = Rotary()
    report = load_into(model, Rotary().state_dict())
    assert report.on_meta == ("frequencies",)
    assert "\non meta 1     frequencies" in repr(report)
    assert load_into(Rotary(), Rotary().state_dict()).on_meta == ()


class Expanded(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("mask", torch.zeros(1).expand(3))


class Counting(nn.Linear):
    """A module with an extra state, which it may refuse."""

    refuses = False

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        if self.refuses:
            raise OSError("not this one")
        self.count = state


class Stubborn(Counting):
    refuses = True


class Objecting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        with torch.no_grad():
            self.weight.zero_()
        raise RuntimeError("no")


class Sized(nn.Linear):
    """A module that takes any size, and then objects."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("scale", torch.ones(2))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.scale.resize_(5).zero_()
        raise RuntimeError("no")


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are deprecated
        return torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)


REFUSALS = {
    "a quantized weight": (lambda: nn.Linear(2, 2), {"weight": quantized()}),
    "bits": (
        lambda: nn.Linear(2, 2),
        {"weight": torch.zeros(2, 2, dtype=torch.uint8).view(torch.bits8)},
    ),
    "an expanded buffer": (Expanded, {"mask": torch.ones(3)}),
    "an extra state": (Stubborn, {"_extra_state": 7}),
    "a module": (Objecting, {"weight": torch.ones(2, 2)}),
    "a module that was resized": (Sized, {"weight": torch.ones(2, 2)}),
    "a module beside a lazy one": (
        lambda: nn.Sequential(nn.LazyLinear(2), Objecting()),
        {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2), "1.weight": torch.ones(2, 2)},
    ),
}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_refuses_leaves_everything_as_it_was(case: str, stored: bool, tmp_path: Path) -> None:
    make, given = REFUSALS[case]
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": Counting(), "c": make(), "d": Counting()})
    state = {f"c.{name}": value for name, value in given.items()}
    for name in ("a", "b", "d"):
        state |= {f"{name}.weight": torch.ones(2, 2), f"{name}.bias": torch.ones(2)}
    state |= {"b._extra_state": 1, "d._extra_state": 1}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    optimizer, _ = train(model["a"], 1)
    before = copy.deepcopy((tensors(model), optimizer.state_dict()))
    place = tmp_path / "a.ckpt" if stored else {"state_dict": state}
    with pytest.raises(MismatchError) as caught:
        load_into(model, place, optimizer=optimizer)
    assert str(caught.value).startswith(str(tmp_path) if stored else "a checkpoint in memory: ")
    after = tensors(model)
    assert after.keys() == before[0].keys()
    for name, parameter in before[0].items():
        assert nn.parameter.is_lazy(parameter) == nn.parameter.is_lazy(after[name])
        assert nn.parameter.is_lazy(parameter) or torch.equal(parameter, after[name])
    assert (model["b"].count, model["d"].count) == (0, 0)
    assert_same(optimizer.state_dict(), before[1])


@pytest.mark.parametrize("error", [MemoryError("full"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_refusal_comes_as_it_is_and_changes_nothing(error: BaseException) -> None:
    class Raising(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            raise error

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["weight"] *= 2
            with torch.no_grad():
                self.bias.add_(1)
            raise error

    model = Raising(2, 2)
    before = copy.deepcopy(model.state_dict())
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    progress = {"optimizer_states": [{}], "lr_schedulers": [{}], "epoch": 1, "global_step": 1}
    for given, steps in ((state, []), ({"state_dict": state, **progress}, [keep_progress])):
        with pytest.raises(type(error)) as caught:
            load_into(model, given, *steps)
        assert caught.value is error
        assert_same(dict(model.state_dict()), dict(before))


class OwnError(Exception):
    """An error of a model's own code."""


def own_ways_to_raise(error: Exception) -> Iterator[nn.Module]:
    """Models whose own code raises an error when they have taken a part of their tensors."""

    def fail(*args: Any) -> Any:
        raise error

    class Loading(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            raise error

    class Overriding(nn.Linear):
        def load_state_dict(self, state: Any, strict: bool = True) -> Any:
            super().load_state_dict(state, strict)
            raise error

    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return 1

        def set_extra_state(self, state: Any) -> None:
            raise error

    yield Overriding(2, 2)
    for kind in (Loading, Extra):
        yield nn.Sequential(nn.Linear(2, 2), kind(2, 2))
    before, after = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    pre_hook(before, fail)
    yield before
    after[0].register_load_state_dict_post_hook(fail)
    yield after


BUILT_IN = [RuntimeError, NotImplementedError, KeyError, OSError, UnicodeError]


@pytest.mark.parametrize("kind", [OwnError, *BUILT_IN, ValueError, ExceptionGroup])
def test_what_a_models_own_code_raises_is_what_the_load_raises(kind: Any, tmp_path: Path) -> None:
    """One of its own class as it is; a built-in one as a refusal that is of its kind, too."""
    error = kind("mine", [OwnError()]) if kind is ExceptionGroup else kind("mine")
    for model in own_ways_to_raise(error):
        state = {name: torch.ones(2, 2) for name in model.state_dict() if "bias" not in name}
        torch.save(state | {n: 1 for n in model.state_dict() if "extra" in n}, tmp_path / "a.ckpt")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(OwnError if kind is OwnError else MismatchError) as caught:
            load_into(model, tmp_path / "a.ckpt")
        if kind is OwnError:
            assert caught.value is error
            assert error.__notes__.pop() == f"while loading {tmp_path / 'a.ckpt'}"
        else:
            assert caught.value.__cause__ is error
            said = f"{tmp_path / 'a.ckpt'}: the model refused it ({kind.__name__}: "
            assert str(caught.value).startswith(said)
            assert [f.name for f in traceback.extract_tb(error.__traceback__)][-1:] in HOOKS
        if kind in BUILT_IN:
            assert isinstance(caught.value, kind)
            again = pickle.loads(pickle.dumps(caught.value))
            assert (type(again), str(again)) == (type(caught.value), str(caught.value))
        assert_same(dict(model.state_dict()), dict(before))


HOOKS = [["_load_from_state_dict"], ["load_state_dict"], ["set_extra_state"], ["fail"]]


def test_what_torch_refuses_is_a_mismatch_whoever_called_it() -> None:
    class Strict(nn.Linear):
        def load_state_dict(self, state: Any) -> Any:
            return super().load_state_dict(state, strict=True)

    class Telling(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            args[-1].append("a message of its own")

    class Shrinking(nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
            state[prefix + "weight"] = state[prefix + "weight"][:1]
            super()._load_from_state_dict(state, prefix, *args)

    for kind, said in (
        (Strict, r"(?s)refused it \(RuntimeError: Error\(s\) in .*Missing key.*bias"),
        (Telling, r"(?s)refused it \(RuntimeError: .*a message of its own"),
        (Shrinking, r"(?s)refused it \(RuntimeError: .*size mismatch for weight"),
    ):
        model = kind(2, 2)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(MismatchError, match=said) as caught:
            load_into(model, {"weight": torch.ones(2, 2)})
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert_same(dict(model.state_dict()), dict(before))


def test_a_gpu_without_memory_is_no_refusal() -> None:
    """torch raises it in frames of its own, here by a future, which has none of a test's."""
    full: Future[Any] = Future()
    full.set_exception(torch.cuda.OutOfMemoryError("full"))
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    model.modules = full.result  # type: ignore[method-assign, assignment] # for this test
    with pytest.raises(torch.cuda.OutOfMemoryError, match="full"):
        load_into(model, {"weight": torch.ones(2, 2)})
    assert_same(dict(model.state_dict()), dict(before))


def test_an_optimizer_that_refuses_its_own_state_as_well() -> None:
    class Refusing(torch.optim.SGD):
        def load_state_dict(self, state: Any) -> None:
            raise KeyError("no state is good")

    model = nn.Linear(2, 2)
    before = snapshot(model)
    checkpoint = {"state_dict": nn.Linear(2, 2).state_dict(), "optimizer_states": [{}]}
    with pytest.raises(KeyError, match=r"refused it .*no state is good"):
        load_into(model, checkpoint, optimizer=Refusing(model.parameters()))
    assert_same(snapshot(model), before)


def test_an_optimizer_is_not_copied_for_fear_of_a_refusal() -> None:
    """What it had is kept by reference: torch's optimizers replace their state."""
    model, source = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer, scheduler = train(model, 1)
    other, _ = train(source, 2)
    had = {id(state["exp_avg"]) for state in optimizer.state.values()}
    checkpoint = {"state_dict": source.state_dict(), "optimizer": other.state_dict()}
    wrong = {**checkpoint, "scheduler": {"last_epoch": 1, "_last_lr": [1], "bad": 1}, "x": 1}

    class Refusing(type(scheduler)):  # type: ignore[misc] # the base is a value: mypy knows no dynamic bases
        def load_state_dict(self, state: Any) -> None:
            if "bad" in state:
                raise KeyError("bad")
            super().load_state_dict(state)

    refusing = Refusing(optimizer, 1)
    with pytest.raises(MismatchError, match=r"refused it \(KeyError: 'bad'\)"):
        load_into(model, wrong, optimizer=optimizer, scheduler=refusing)
    assert {id(state["exp_avg"]) for state in optimizer.state.values()} == had
    assert int(next(iter(optimizer.state.values()))["step"]) == 1


# ── all or nothing ────────────────────────────────────────────────────────────────────────────


def test_a_damaged_checkpoint_changes_nothing(tmp_path: Path) -> None:
    source = nn.Linear(100, 100)
    data = bytearray(as_bytes({"state_dict": source.state_dict()}))
    data[data.index(source.bias.detach().numpy().tobytes()[:40]) + 20] ^= 1
    (tmp_path / "a.ckpt").write_bytes(data)
    model = nn.Linear(100, 100)
    before = snapshot(model)
    with pytest.raises(CorruptError):
        load_into(model, tmp_path / "a.ckpt")
    assert_same(snapshot(model), before)


def test_values_that_are_no_tensors_of_the_model_change_nothing() -> None:
    model = nn.Linear(2, 2)
    before = snapshot(model)
    for bias in ([1.0, 1.0], torch.ones(2).to_sparse()):
        with pytest.raises(MismatchError, match="1 are no tensors of the model's layout: bias"):
            load_into(model, {"weight": torch.ones(2, 2), "bias": bias})
        assert_same(snapshot(model), before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_told_and_nothing_breaks(layout: torch.layout) -> None:
    def nested() -> torch.Tensor:
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)

    model = nn.Linear(2, 2)
    before = snapshot(model)
    with pytest.raises(MismatchError, match="1 are no tensors of the model's layout: bias"):
        load_into(model, {"weight": torch.ones(2, 2), "bias": nested()})
    assert_same(snapshot(model), before)
    assert load_into(model, {"weight": torch.ones(2, 2), "x": nested()}).unexpected == ("x",)
    model.register_buffer("parts", nested())
    assert load_into(model, {"weight": torch.ones(2, 2)}).missing == ("bias", "parts")
    for parts in (nested(), torch.ones(2, 3)):
        with pytest.raises(MismatchError, match="1 are no tensors of the model's layout: parts"):
            load_into(model, {"weight": torch.ones(2, 2), "parts": parts})
    left = filter_shapes(nn.Linear(2, 2))({"weight": nested(), "bias": torch.ones(2)})
    assert list(left) == ["bias"]


def test_a_model_made_in_inference_mode_is_filled_or_left() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    state = filled(nn.Linear(2, 2)).state_dict()
    with pytest.raises(MismatchError):  # though torch has written when it refuses
        load_into(
            model,
            {"state_dict": state, "optimizer_states": [{"bad": 1}]},
            optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
        )
    assert_same({n: v.detach().clone() for n, v in model.named_parameters()}, before)
    load_into(model, state)
    assert_same({n: v.detach().clone() for n, v in model.named_parameters()}, dict(state))


def test_versions_of_modules_reach_them() -> None:
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest: Any) -> None:
            assert local_metadata["version"] == 2
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    source, model = Versioned(2, 2), Versioned(2, 2)
    load_into(model, source.state_dict())
    assert torch.equal(model.weight, source.weight)


def test_an_extra_state_that_adds_to_what_is_there_is_put_back() -> None:
    class Growing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1)
            self.history, self.seen = [1], {"a": {1}}

        def get_extra_state(self) -> list[int]:
            return self.history

        def set_extra_state(self, state: list[int]) -> None:
            self.history.extend(state)
            self.seen["a"].add(9)
            self.late = state

    model, other = (
        nn.Sequential(Growing(), nn.Linear(1, 1)),
        nn.Sequential(Growing(), nn.Linear(1, 1)),
    )
    before = {name: each.clone() for name, each in model.state_dict().items() if name[-1] != "e"}
    with pytest.raises(MismatchError):
        load_into(model, {**other.state_dict(), "odd": torch.ones(1)}, strict=True)
    assert model[0].history == [1]
    assert model[0].seen == {"a": {1}}
    assert not hasattr(model[0], "late")
    assert_same({n: e for n, e in model.state_dict().items() if n in before}, before)
    load_into(model, other.state_dict())
    assert model[0].history == [1, 1]


def test_a_module_that_refuses_its_extra_state_changes_nothing() -> None:
    class Refusing(nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(1)

        def set_extra_state(self, state: torch.Tensor) -> None:
            raise ValueError("not this one")

    model = Refusing(2, 2)
    optimizer, _ = train(model, 1)
    before = snapshot(model), copy.deepcopy(optimizer.state_dict())
    other = {**Refusing(2, 2).state_dict()}
    state = copy.deepcopy(before[1])
    state["param_groups"][0]["lr"] = 9.0
    with pytest.raises(ValueError, match="not this one"):
        load_into(model, {"state_dict": other, "optimizer": state}, optimizer=optimizer)
    assert_same(optimizer.state_dict(), before[1])
    assert_same(snapshot(model), before[0])


def test_shapes_that_differ_are_an_error_that_shows_them(http_server, checkpoint) -> None:
    checkpoint["state_dict"]["large"] = torch.zeros(10**6)
    model = Tied(5)
    before = snapshot(model)
    uri = http_server.put("a.ckpt", as_bytes(checkpoint))
    with pytest.raises(MismatchError) as caught:
        load_into(model, uri)
    said = str(caught.value)
    assert said.startswith(
        f"{uri}: 4 shapes differ: encoder.weight (3, 4) in the checkpoint, (5, 4)"
    )
    assert "load what fits with filter_shapes(model)" in said
    assert_same(snapshot(model), before)
    assert http_server.bytes_sent < 10**6  # told before anything was fetched


def test_shapes_that_a_strategy_left_out_are_reported(checkpoint) -> None:
    model = Tied(5)
    report = load_into(model, checkpoint, lambda c: {"mean": weights(c)["mean"]})
    assert report.loaded == ("mean",)
    assert report.mismatched["encoder.weight"] == ((3, 4), (5, 4))
    assert report.missing == ()


def test_missing_unexpected_and_strict(checkpoint) -> None:
    state = checkpoint["state_dict"]
    state["head.weight"] = torch.ones(2)
    del state["mean"]
    report = load_into(Tied(), checkpoint)
    assert (report.missing, report.unexpected) == (("mean",), ("head.weight",))
    model = Tied()
    before = snapshot(model)
    with pytest.raises(MismatchError, match=r"1 missing: mean; 1 unexpected: head\.weight; leave"):
        load_into(model, checkpoint, strict=True)
    assert_same(snapshot(model), before)
    del state["head.weight"]
    state["mean"] = torch.ones(4)
    assert load_into(model, checkpoint, strict=True).missing == ()


def test_a_load_that_puts_in_nothing_or_too_little_is_an_error(checkpoint) -> None:
    model = Tied()
    with pytest.raises(MismatchError, match=r"only 0 of the model's 34 values .*strip_prefix"):
        load_into(model, {f"net.{k}": t for k, t in checkpoint["state_dict"].items()})
    only = {"encoder.bias": torch.ones(3)}
    with pytest.raises(MismatchError, match="only 3 of the model's 34 values"):
        load_into(model, only, require=0.9)
    assert load_into(model, only, require=0.05).loaded == ("encoder.bias",)
    with pytest.raises(ValueError, match="share from 0 to 1, not 90"):
        load_into(model, only, require=90)
    with pytest.raises(MismatchError, match="the strategies left no weights, but epoch"):
        load_into(model, checkpoint, lambda c: {"epoch": c["epoch"]})
    with pytest.raises(MismatchError, match="the strategies left no weights, but int"):
        load_into(model, checkpoint, lambda c: c["epoch"])


# ── the report ────────────────────────────────────────────────────────────────────────────────


def test_renamed_weights_are_told(checkpoint) -> None:
    state = {f"model.{k}": t for k, t in checkpoint["state_dict"].items()}
    report = load_into(
        Tied(),
        {"state_dict": {**state, "model.extra": torch.ones(1)}},
        lambda c: {k.removeprefix("model."): t for k, t in weights(c).items()},
    )
    assert report.renamed["model.encoder.bias"] == "encoder.bias"
    assert report.unexpected == ("extra",)
    cast = load_into(
        Tied(),
        {"state_dict": {**state, "model.extra": torch.ones(1)}},
        lambda c: {k.removeprefix("model."): t.double() for k, t in weights(c).items()},
    )
    assert cast.renamed == {}  # new tensors: nobody knows where they are from
    assert cast.unexpected == ("extra",)


def test_a_report_is_a_short_table() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)), nn.Linear(2, 3))
    state = {f"model.{k}": t for k, t in model.state_dict().items()}
    state |= {"model.12.weight": torch.ones(7, 2), "epoch_head": torch.ones(1)}
    del state["model.3.bias"]

    def fit(checkpoint: Any) -> Any:
        names = {k: k.removeprefix("model.") for k in checkpoint["state_dict"]}
        found = {names[k]: t for k, t in checkpoint["state_dict"].items()}
        return {**checkpoint, "state_dict": {k: t for k, t in found.items() if k != "12.weight"}}

    report = load_into(model, {"state_dict": state, "epoch": 3, "global_step": 7}, fit)
    assert repr(report).splitlines() == [
        "checkpoint    a checkpoint in memory",
        "loaded 24     {0…11}.weight",
        "              {0,1,2,4,5,6,7,8,9,10,11,12}.bias",
        "missing 2     3.bias",
        "              12.weight",
        "unexpected 2  epoch_head",
        "              model.12.weight",
        "mismatched 0",
        "renamed 24    model.{0…11}.weight → {0…11}.weight",
        "              model.{0,1,2,4,5,6,7,8,9,10,11,12}.bias → {0,1,2,4,5,6,7,8,9,10,11,12}.bias",
        "restored 0",
        "rest          epoch, global_step",
    ]
    shown = report._repr_html_()
    assert shown.startswith("<table><tr><th")
    assert "<code>{0…11}.weight</code>" in shown


def test_long_lists_are_cut(checkpoint) -> None:
    report = load_into(
        nn.Linear(2, 2), {"bias": torch.ones(2), **{c * 3: torch.ones(1) for c in "abcdefghij"}}
    )
    assert "… and 4 more" in repr(report)
    with pytest.raises(MismatchError, match="… and 5 more"):
        load_into(nn.Linear(2, 2), {chr(97 + i) * 3: torch.ones(1) for i in range(25)})


def test_folding() -> None:
    assert folded([]) == []
    assert folded(["a.0.b.0.w", "a.0.b.1.w", "a.1.b.0.w", "a.1.b.1.w"]) == ["a.{0…1}.b.{0…1}.w"]
    assert folded(["a.3", "a.7", "b", "a.x"]) == ["a.{3,7}", "b", "a.x"]


# ── a real warm start ─────────────────────────────────────────────────────────────────────────


def trainer_and_net(epochs: int, resume: Path | None) -> tuple[Any, Any, Any]:
    import lightning

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0 if resume is None else 99)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch[0]) - batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            if resume is not None:
                report = load_into(self, resume, optimizer=optimizer, scheduler=scheduler)
                assert report.restored == ("optimizer", "scheduler")
                assert report.rest["epoch"] == 2
            return [optimizer], [scheduler]

    samples = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(samples), batch_size=8)
    return quiet_trainer(max_epochs=epochs), Net(), loader


@pytest.mark.filterwarnings("ignore")
def test_a_warm_start_goes_on_as_if_nothing_had_been(
    http_server, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, uninterrupted, loader = trainer_and_net(4, None)
    trainer.fit(uninterrupted, loader)
    trainer, first, loader = trainer_and_net(2, None)
    trainer.fit(first, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not torch.equal(first.net[0].weight, uninterrupted.net[0].weight)
    trainer, second, loader = trainer_and_net(2, tmp_path / "last.ckpt")
    trainer.fit(second, loader)
    assert_same(dict(second.state_dict()), dict(uninterrupted.state_dict()))
    trainer, third, loader = trainer_and_net(4, None)
    url = http_server.put("last.ckpt", (tmp_path / "last.ckpt").read_bytes())
    trainer.fit(third, loader, ckpt_path=download(url, tmp_path / "copy.ckpt"))
    assert_same(dict(third.state_dict()), dict(uninterrupted.state_dict()))


def test_a_real_lightning_checkpoint_into_its_model(place, tmp_path: Path) -> None:
    path = lightning_checkpoint(tmp_path)
    state = load(path, weights)
    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512))
    report = load_into(
        model,
        place.put("last.ckpt", path.read_bytes()),
        lambda c: {k.removeprefix("model."): t for k, t in weights(c).items()},
        strict=True,
    )
    assert report.missing == report.unexpected == ()
    assert torch.equal(model[3].weight, state["model.3.weight"])
    assert report.bytes_moved < 0.4 * report.bytes_stored


# ── what few models do ────────────────────────────────────────────────────────────────────────


def test_strict_counts_what_a_hook_leaves() -> None:
    model = Renaming()
    before = snapshot(model)
    state = {**filled(Renaming()).state_dict(), "ghost.weight": torch.ones(1)}
    with pytest.raises(MismatchError, match=r"ghost\.weight"):
        load_into(model, state, strict=True)
    assert_same(snapshot(model), before)


def test_an_extra_state_of_no_module_is_unexpected() -> None:
    model, state = Renaming(), filled(Renaming()).state_dict()
    report = load_into(model, {**state, "ghost._extra_state": 1})
    assert report.unexpected == ("ghost._extra_state",)
    assert_same(snapshot(model), dict(state))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_module_keeps_its_tensors() -> None:
    """It got the checkpoint's, and an optimizer that was made before trained others."""
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))
    addresses = {name: value.data_ptr() for name, value in model.state_dict().items()}
    source = filled(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    load_into(model, {name: value.double() for name, value in source.state_dict().items()})
    assert_same(snapshot(model), snapshot(source))
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == addresses
    before = snapshot(model)
    wrong = {"state_dict": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()}
    wrong["optimizer_states"] = [{"bad": 1}]
    with pytest.raises(MismatchError):
        load_into(model, wrong, optimizer=torch.optim.SGD(model.parameters()))
    assert_same(snapshot(model), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_module_is_filled() -> None:
    source = filled(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    report = load_into(model, source.state_dict())
    assert (report.missing, report.unexpected) == ((), ())
    assert_same(snapshot(model), snapshot(source))


def test_tensors_of_a_dtype_that_a_copy_may_refuse() -> None:
    model, before = nn.Module(), torch.zeros(3, dtype=torch.float8_e4m3fn)
    model.register_buffer("scale", before)
    value = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float8_e4m3fn)
    load_into(model, {"scale": value})
    assert model.scale is before
    assert model.scale.float().tolist() == [1, 2, 0.5]
