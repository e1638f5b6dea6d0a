"""The law of fusion, `load(uri, f) == f(load(uri))`, over ordinary functions of tensors.

What a function writes into files counts as well, and what it leaves in objects that it returns.
"""

import _thread
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import pprint
import random
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everyone writes it
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import servers
from _anemoi_ckpt.planning import random_states
from anemoi_ckpt import load, save
from checkpoints import as_bytes, assert_same
from strategies import pipe, weights

HELD = {
    "w": torch.tensor([[3.0, -1.0, 2.0], [0.5, 4.0, -2.5]]),
    "v": torch.tensor([0.25, -0.5, 1.0]),
    "i": torch.tensor([2, 0, 1]),
    "b": torch.tensor([True, False, True]),
    "s": torch.tensor(0.25),
    "n": torch.tensor(3),
    "p": nn.Parameter(torch.tensor([1.0, 2.0, 3.0])),
    "m": torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]]),
    "c": torch.tensor([1 + 2j, 3 - 1j]),
    "e": torch.empty(0),
}


@dataclasses.dataclass
class Record:
    weight: torch.Tensor
    name: str = "w"


@attrs.frozen(eq=False)
class Frozen:
    weight: torch.Tensor


class Tiny(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("copy", weight.detach() * 2)


def to_buffer(write: Callable[[io.BytesIO], Any]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def printed(*values: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print(*values)  # noqa: T201 - what it prints is compared
    return out.getvalue()


def set_data(tensor: torch.Tensor) -> Any:
    real = nn.Parameter(torch.zeros(1))
    real.data = tensor
    return real.sum().item()


def in_thread(function: Callable[[Any], Any], value: Any) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function(value)))
    thread.start()
    thread.join()
    return results


def in_bare_thread(function: Callable[[Any], Any], value: Any) -> Any:
    results: list[Any] = []
    done = threading.Event()
    _thread.start_new_thread(lambda: (results.append(function(value)), done.set()), ())
    done.wait()
    return results


def device_by_torchscript(x: torch.Tensor) -> bool:
    return x.device == torch.device("cpu")


class DeviceByTorchScript(nn.Module):
    def forward(self, x: torch.Tensor) -> bool:
        return x.is_meta


def by_torchscript(tensor: torch.Tensor) -> Any:
    return torch.jit.script(device_by_torchscript)(tensor)


def by_module_of_torchscript(tensor: torch.Tensor) -> Any:
    return torch.jit.script(DeviceByTorchScript())(tensor)


def in_autocast(tensor: torch.Tensor) -> Any:
    with torch.autocast(tensor.device.type):
        return (tensor @ tensor.T).dtype


def numpy_or_nothing(tensor: torch.Tensor) -> Any:
    try:
        return np.from_dlpack(tensor)
    except Exception:  # as users write it, whatever numpy may raise
        return None


def distributed(tensor: torch.Tensor) -> Any:
    from torch.distributed import checkpoint

    result = {"w": torch.zeros(2, 3)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save({"w": tensor}, checkpoint_id=folder, no_dist=True)
        checkpoint.load(result, checkpoint_id=folder, no_dist=True)
    return result


def in_pool(function: Callable[[Any], Any], values: Any) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, values))


def forked(tensor: torch.Tensor) -> int:
    child = os.fork()
    if not child:
        os._exit(int("4." in repr(tensor)))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def foreach(tensor: torch.Tensor) -> Any:
    real = [torch.zeros(2, 3)]
    torch._foreach_add_(real, [tensor])
    return float(real[0].sum())


def foreach_of_both(sd: Any) -> Any:
    torch._foreach_mul_([sd["w"], mine := torch.ones(3)], [sd["w"], sd["v"]])
    return mine.tolist()


def averaged(tensor: torch.Tensor) -> Any:
    mean = [torch.zeros(2, 3)]
    get_ema_multi_avg_fn(0.5)(mean, [tensor], 1)
    return mean[0].norm().item()


def averaged_model(tensor: torch.Tensor) -> Any:
    model = AveragedModel(Tiny(torch.zeros(2, 3)))
    model.update_parameters(Tiny(tensor))
    model.update_parameters(Tiny(tensor * 3))
    return model.state_dict()


def out_of_max(tensor: torch.Tensor) -> Any:
    values, places = torch.zeros(3), torch.zeros(3, dtype=torch.long)
    torch.max(tensor, 0, out=(values, places))
    return values.sum().item(), places.tolist()


def out_of_add(tensor: torch.Tensor) -> Any:
    result = torch.empty(3)
    same = torch.add(tensor, 1, out=result)
    return same is result, result


def into_slice(tensor: torch.Tensor) -> Any:
    real = torch.zeros(4, 3)
    real[1:3] = tensor
    return real.sum(0).tolist()


def into_memory_of_numpy(tensor: torch.Tensor) -> Any:
    array = np.zeros(3, np.float32)
    torch.from_numpy(array).copy_(tensor)
    return array.tolist()


def into_hollow(sd: Any) -> Any:
    target = sd["w"].clone()
    target[0] = sd["v"]
    target[1, 2] = 7
    return target


def filled(sd: Any) -> Any:
    model = nn.Linear(3, 2)
    model.load_state_dict({"weight": sd["w"], "bias": sd["v"][:2]})
    return model.weight.norm().item(), model.state_dict()


def assigned(sd: Any) -> Any:
    model = nn.Linear(3, 2)
    model.load_state_dict({"weight": sd["w"], "bias": sd["v"][:2]}, assign=True)
    return model


def stepped(sd: Any) -> Any:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], 0.5)
    parameter.grad = sd["v"].clone()
    optimizer.step()
    return parameter


def backward(sd: Any) -> Any:
    weight = sd["w"].clone().requires_grad_()
    (weight * sd["v"]).sum().backward()
    return weight.grad


def backward_into_real(sd: Any) -> Any:
    real = torch.ones(3, requires_grad=True)
    (real * sd["v"]).sum().backward()
    return real.grad.tolist()


def optimizer_of(sd: Any) -> Any:
    optimizer = torch.optim.Adam([sd["p"]])
    return optimizer.state_dict(), optimizer.param_groups[0]["params"]


def normed(module: nn.Module) -> Callable[[Any], Any]:
    def strategy(sd: Any) -> Any:
        own = copy.deepcopy(module)
        out = own(sd["m"])
        return out, own.running_mean.tolist(), own.running_var

    return strategy


def only_statistics(sd: Any) -> Any:
    module = nn.BatchNorm1d(3)
    module(sd["m"])
    return module.running_mean.clone()


def swallowed(error: type[BaseException]) -> Callable[[Any], Any]:
    def strategy(sd: Any) -> Any:
        try:
            return float(sd["w"].sum())
        except error:
            return "no value"

    return strategy


def counted(sd: Any) -> Any:
    return sd["w"] if sd["n"].item() == 3 else sd["v"]


def unheard(sd: Any) -> Any:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        return sd["w"] * 2


def ties(sd: Any) -> Any:
    both = {"a": sd["w"], "b": sd["w"][0], "c": sd["v"]}
    return len({t.untyped_storage().data_ptr() for t in both.values()})


def hooked(sd: Any) -> Any:
    weight = sd["v"].clone().requires_grad_()
    seen: list[Any] = []
    weight.register_hook(lambda grad: seen.append(grad.tolist()))
    (weight * sd["v"]).sum().backward()
    return seen


def closure(sd: Any) -> Any:
    return sd["w"].sum


class Named(torch.Tensor):
    pass


def compiled(function: Callable[[Any], Any], **options: Any) -> Callable[[Any], Any]:
    def strategy(tensor: torch.Tensor) -> Any:
        return torch.compile(function, backend="eager", **options)(tensor)

    return strategy


def drawn_and_dropped(draw: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    def strategy(tensor: torch.Tensor) -> Any:
        torch.manual_seed(3)
        draw(tensor)
        return torch.rand(3)

    return strategy


def into_meta(sd: Any) -> Any:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    model.load_state_dict({"weight": sd["w"], "bias": sd["v"][:2]})
    return model.weight.is_meta, model.weight.device.type


def permuted(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor * 2]).permute(2, 0, 1)


ANSWERS: dict[str, Callable[[Any], Any]] = {
    name: functools.partial(lambda get, sd: [get(t) for t in sd.values()], get)
    for name, get in {
        "repr": repr,
        "str": str,
        "format": "{}".format,
        "device": lambda t: t.device,
        "type of device": lambda t: t.device.type,
        "is_meta": lambda t: t.is_meta,
        "is_cpu": lambda t: t.is_cpu,
        "is_cuda": lambda t: t.is_cuda,
        "get_device": lambda t: t.get_device(),
        "type()": lambda t: t.type(),
        "python type": type,
        "layout": lambda t: t.layout,
        "dtype": lambda t: t.dtype,
        "shape": lambda t: t.shape,
        "size": lambda t: t.size(),
        "stride": lambda t: t.stride(),
        "strides of a transposed clone": lambda t: t.t().clone().stride() if t.ndim < 3 else 0,
        "numel": torch.numel,
        "nbytes": lambda t: t.nbytes,
        "element_size": lambda t: t.element_size(),
        "contiguous": lambda t: t.is_contiguous(),
        "pinned": lambda t: t.is_pinned(),
        "shared": lambda t: t.is_shared(),
        "requires_grad": lambda t: (t.requires_grad, t.is_leaf, t.grad, t.grad_fn),
        "floating": torch.is_floating_point,
        "is parameter": lambda t: isinstance(t, nn.Parameter),
        "storage offset": lambda t: t.reshape(-1)[1:].storage_offset() if t.numel() else 0,
        "size of storage": lambda t: t.untyped_storage().nbytes(),
        "device of storage": lambda t: str(t.untyped_storage().device),
        "has address": lambda t: bool(t.data_ptr()) == bool(t.numel()),
        "result_type": lambda t: torch.result_type(t, 1.0),
        "attributes": lambda t: hasattr(t, "__cuda_array_interface__"),
        "dir": dir,
        "names": lambda t: t.names,
        "cpu is itself": lambda t: (t.cpu() is t, t.to("cpu") is t, t.to(torch.device("cpu")) is t),
        "tolist": lambda t: t.tolist(),
        "numpy": lambda t: t.detach().numpy(),
        "asarray": lambda t: np.asarray(t.detach()),
        "pickle": lambda t: pickle.loads(pickle.dumps(t)),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "any": lambda t: bool(t.any()),
        "reduce": lambda t: t.__reduce_ex__(4)[0].__name__,
        "equal": lambda t: torch.equal(t, t.clone()),
        "allclose": lambda t: torch.allclose(t, t * 1),
        "hash of bytes": lambda t: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest(),
        "made on its device": lambda t: torch.zeros(2, device=t.device),
        "moved to it": lambda t: torch.ones(2).to(t).tolist(),
        "to its type": lambda t: torch.ones(2).type_as(t),
        "new_tensor": lambda t: t.new_tensor([1, 0]).tolist(),
        "new_zeros": lambda t: t.new_zeros(2),
        "like": lambda t: (torch.zeros_like(t), torch.full_like(t, 1).tolist()),
    }.items()
}

OF_W: dict[str, Callable[[torch.Tensor], Any]] = {
    "dlpack": lambda t: torch.from_dlpack(t).sum().item(),
    "numpy from dlpack": np.from_dlpack,
    "numpy from dlpack, or something else": numpy_or_nothing,
    "data": set_data,
    "half": lambda t: t.half(),
    "double": lambda t: t.to(torch.float64),
    "index": lambda t: t[0, 1],
    "slice": lambda t: t[:, ::2],
    "ellipsis": lambda t: t[..., None],
    "mask": lambda t: t[t > 0],
    "masked_fill": lambda t: t.masked_fill(t < 0, 0.0),
    "masked_select": lambda t: torch.masked_select(t, t > 1),
    "where": lambda t: torch.where(t > 0, t, -t),
    "where of one": lambda t: torch.where(t > 0),
    "nonzero": lambda t: torch.nonzero(t > 0),
    "argwhere": torch.argwhere,
    "unique": torch.unique,
    "unique with counts": lambda t: t.unique(return_counts=True),
    "sort": torch.sort,
    "argsort": lambda t: t.argsort(descending=True),
    "topk": lambda t: t.topk(2),
    "kthvalue": lambda t: t.kthvalue(2),
    "median": torch.median,
    "mode": torch.mode,
    "quantile": lambda t: t.quantile(0.5),
    "max": lambda t: t.max().item(),
    "argmax": lambda t: int(t.argmax()),
    "aminmax": torch.aminmax,
    "sum": lambda t: t.sum(0),
    "mean": lambda t: t.mean(dim=1, keepdim=True),
    "std": torch.std,
    "var_mean": torch.var_mean,
    "norm": lambda t: t.norm().item(),
    "prod": lambda t: t.prod(1),
    "cumsum": lambda t: t.cumsum(0),
    "logsumexp": lambda t: t.logsumexp(0),
    "count_nonzero": torch.count_nonzero,
    "histc": lambda t: t.histc(4),
    "bincount": lambda t: t.abs().long().flatten().bincount(),
    "isnan": lambda t: bool(t.isnan().any()),
    "isfinite": lambda t: torch.isfinite(t).all().item(),
    "clamp": lambda t: t.clamp(-1, 1),
    "round": lambda t: round(float(t[0, 0]), 1),
    "matmul": lambda t: t @ t.T,
    "einsum": lambda t: torch.einsum("ij,kj->ik", t, t),
    "outer": lambda t: torch.outer(t[0], t[1]),
    "svd": lambda t: torch.linalg.svdvals(t).round(decimals=3),
    "qr": lambda t: torch.linalg.qr(t).R.abs(),
    "pinv": torch.linalg.pinv,
    "matrix_rank": lambda t: torch.linalg.matrix_rank(t).item(),
    "vector_norm": torch.linalg.vector_norm,
    "cat": lambda t: torch.cat([t, t]),
    "stack": lambda t: torch.stack([t, t], 1),
    "chunk": lambda t: t.chunk(2),
    "unbind": list,
    "len": len,
    "iterate": lambda t: [row.sum().item() for row in t],
    "in": lambda t: 4.0 in t,
    "permute": lambda t: t.permute(1, 0),
    "contiguous": lambda t: t.T.contiguous(),
    "flip": lambda t: t.flip(0),
    "roll": lambda t: t.roll(1, 1),
    "repeat": lambda t: t.repeat(2, 1),
    "repeat_interleave": lambda t: t.repeat_interleave(torch.tensor([1, 2]), 0),
    "expand": lambda t: t[None].expand(4, 2, 3),
    "pad": lambda t: F.pad(t, (1, 1)),
    "tril": torch.tril,
    "diagonal": torch.diagonal,
    "sparse": lambda t: t.to_sparse().coalesce().indices(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8).int_repr(),
    "relu": F.relu,
    "softmax": lambda t: F.softmax(t, -1),
    "layer_norm": lambda t: F.layer_norm(t, (3,)),
    "normalize": F.normalize,
    "mse": lambda t: F.mse_loss(t, torch.zeros(2, 3)).item(),
    "interpolate": lambda t: F.interpolate(t[None], 6),
    "cosine": lambda t: F.cosine_similarity(t[0], t[1], 0),
    "lerp": lambda t: torch.lerp(t, t * 2, 0.5),
    "vmap": torch.vmap(lambda row: row * 2),
    "vmap over its device": torch.vmap(lambda row: torch.zeros(3, device=row.device) + row),
    "jacobian": torch.func.jacrev(lambda x: (x * x).sum()),
    "grad": torch.func.grad(lambda x: (x**3).sum()),
    "view of bytes": lambda t: t.view(torch.uint8),
    "frexp": torch.frexp,
    "compare": lambda t: bool((t == t.max()).any()),
    "truth": lambda t: "yes" if t[0, 0] > 2 else "no",
    "index of a list": lambda t: ["a", "b", "c", "d"][t[0, 0].int()],
    "range": lambda t: list(range(t[0, 0].int())),
    "python numbers": lambda t: (int(t[0, 0]), float(t[0, 1]), complex(t[0, 2])),
    "assert": lambda t: torch.testing.assert_close(t, t + 0),
    "typename": torch.typename,
    "is_tensor": torch.is_tensor,
    "foreach": foreach,
    "ema": averaged,
    "averaged model": averaged_model,
    "out=(a, b)": out_of_max,
    "out=": lambda t: out_of_add(t[0]),
    "into a slice": into_slice,
    "into memory of numpy": lambda t: into_memory_of_numpy(t[0]),
    **{
        f"drawn by {name} and dropped": drawn_and_dropped(draw)
        for name, draw in {
            "rand_like": torch.rand_like,
            "dropout": F.dropout,
            "normal_": lambda t: t.clone().normal_(),
            "bernoulli": lambda t: torch.bernoulli(t.sigmoid()),
            "init": lambda t: nn.init.xavier_uniform_(torch.empty_like(t)),
        }.items()
    },
    "compiled": compiled(lambda x: x * 2 + 1),
    "compiled whole": compiled(lambda x: x * 2 + 1, fullgraph=True),
    "compiled and device": compiled(lambda x: (x + 1, x.device.type)),
    "cond": lambda t: torch.cond(t.sum() > 2, torch.sin, torch.cos, (t,)),
    "subclass": lambda t: (Named(t).tolist(), type(Named(t) * 2).__name__),
    "set_": lambda t: torch.zeros(1).set_(t).tolist(),
    "set_ of a storage": lambda t: torch.zeros(0).set_(t.untyped_storage()).sum().item(),
    "swap": lambda t: (torch.zeros(2, 3) + t).neg_(),
    "share_memory_": lambda t: t.clone().share_memory_().is_shared(),
    "thread": lambda t: in_thread(repr, t),
    "bare thread": lambda t: in_bare_thread(repr, t),
    "torchscript": by_torchscript,
    "module of torchscript": by_module_of_torchscript,
    "autocast": in_autocast,
    "torch.distributed.checkpoint": distributed,
    "pool": lambda t: in_pool(lambda row: (str(row.device), repr(row)), t),
    "pool that computes": lambda t: in_pool(lambda row: row * 2, t),
    **({"fork": forked} if hasattr(os, "fork") else {}),
    "module": Tiny,
    "module as text": lambda t: repr(nn.ParameterDict({"w": t})),
    "parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "dataclass": lambda t: dataclasses.asdict(Record(t)),
    "dataclass as text": lambda t: repr(Record(t)),
    "attrs": lambda t: Frozen(t).weight,
    "asdict of attrs": lambda t: attrs.asdict(Frozen(t)),
    "attrs as text": lambda t: str(Frozen(t)),
    "parametrized": lambda t: nn.utils.parametrizations.weight_norm(Tiny(t)).state_dict(),
    "vector": lambda t: nn.utils.parameters_to_vector([nn.Parameter(t), nn.Parameter(t)]),
    "clip": lambda t: nn.utils.clip_grad_norm_([nn.Parameter(t)], 1.0).item(),
    "dataset": lambda t: [
        row.tolist()
        for (row,) in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(t), batch_size=2)
    ],
    "index of its own": lambda t: t[t[0].argsort().argsort() % 2].sum().item(),
    "scatter": lambda t: torch.zeros(2, 3).scatter_(1, t.argsort(1), t).tolist(),
    "index_put": lambda t: torch.zeros(3).index_put_((torch.tensor([1]),), t[0, :1]).tolist(),
}

OF_ALL: dict[str, Callable[[Any], Any]] = {
    "torch.save": lambda sd: torch.load(
        io.BytesIO(to_buffer(lambda out: torch.save(dict(sd), out)))
    ),
    "pickle": lambda sd: pickle.loads(pickle.dumps(sd)),
    "print": printed,
    "pprint": pprint.pformat,
    "format with digits": lambda sd: f"{sd['s']:.2f} {sd['n']:03d}",
    "percent": lambda sd: "%.3f" % sd["s"],  # noqa: UP031 - the case
    "json": lambda sd: json.dumps({k: t.tolist() for k, t in sd.items() if k in "wvin"}),
    "deepcopy": copy.deepcopy,
    "into a model": filled,
    "assigned": assigned,
    "a step": stepped,
    "backward": backward,
    "backward into a real one": backward_into_real,
    "optimizer": optimizer_of,
    "batch norm": normed(nn.BatchNorm1d(3)),
    "instance norm": normed(nn.InstanceNorm1d(3, track_running_stats=True)),
    "statistics": only_statistics,
    "swallowed by except Exception": swallowed(Exception),
    "swallowed by except BaseException": swallowed(BaseException),
    "suppressed": swallowed(RuntimeError),
    "counter": counted,
    "ties": ties,
    "hook": hooked,
    "into hollow": into_hollow,
    "foreach of both": foreach_of_both,
    "largest": lambda sd: max(("w", "v", "m"), key=lambda k: sd[k].abs().sum().item()),
    "sorted by value": lambda sd: sorted(["n", "s"], key=lambda k: float(sd[k])),
    "gather": lambda sd: sd["v"][sd["i"]],
    "mask of another": lambda sd: sd["v"][sd["b"]].tolist(),
    "embedding": lambda sd: F.embedding(sd["i"], sd["m"]),
    "one_hot": lambda sd: F.one_hot(sd["i"]),
    "cross_entropy": lambda sd: F.cross_entropy(sd["m"], sd["i"]).item(),
    "linear": lambda sd: F.linear(sd["w"], sd["m"], sd["v"]),
    "solve": lambda sd: torch.linalg.solve(sd["m"], sd["v"]),
    "cholesky": lambda sd: torch.linalg.cholesky(sd["m"]).diagonal().tolist(),
    "eigh": lambda sd: torch.linalg.eigvalsh(sd["m"]).round(decimals=3),
    "inverse": lambda sd: sd["m"].inverse(),
    "det": lambda sd: torch.det(sd["m"]).item(),
    "multi_dot": lambda sd: torch.linalg.multi_dot([sd["w"], sd["m"], sd["m"]]),
    "real and imaginary": lambda sd: (sd["c"].real, sd["c"].conj().imag.tolist()),
    "numpy mean": lambda sd: float(np.mean([t.detach().numpy().sum() for t in (sd["w"], sd["p"])])),
    "data of itself": lambda sd: setattr(sd["p"], "data", sd["p"].data.half()) or sd["p"],
    "requires_grad_": lambda sd: sd["w"].clone().requires_grad_(),
    "closure": lambda sd: closure(sd)().item(),
    "generator": lambda sd: list(t.sum() for t in (sd["w"], sd["v"])),  # noqa: C400 - the case
    "ordered": OrderedDict,
    "chained": lambda sd: functools.reduce(torch.add, [sd["v"], sd["p"], torch.ones(3)]),
    "no_grad": torch.no_grad()(lambda sd: sd["p"] * 2),
    "unheard by any mode": unheard,
    "by keyword": lambda sd: [torch.add(input=sd["v"], other=1), F.relu(input=sd["w"]).tolist()],
    "a parameter's data": lambda sd: (
        setattr(p := nn.Parameter(torch.ones(3)), "data", sd["v"]) or p
    ),
    "a parameter's gradient": lambda sd: (
        setattr(p := nn.Parameter(torch.ones(3)), "grad", sd["v"]) or (p.grad, p.grad.tolist())
    ),
    "strides of eig": lambda sd: torch.linalg.eig(sd["m"])[1].stride(),
    "strides of svd": lambda sd: [
        t.stride() for f in (torch.svd, torch.linalg.svd) for t in f(sd["m"])
    ],
    "strides of svd_lowrank": lambda sd: [t.stride() for t in torch.svd_lowrank(sd["m"], 2)],
    "strides of pca_lowrank": lambda sd: [t.stride() for t in torch.pca_lowrank(sd["m"], 2)],
    "strides of nonzero_static": lambda sd: torch.nonzero_static(sd["m"], size=4).stride(),
    "condition": lambda sd: torch.linalg.cond(sd["m"]).item(),
    "singular values": lambda sd: torch.linalg.svdvals(sd["m"]).tolist(),
    "strides of rfft2": lambda sd: torch.fft.rfft2(permuted(sd["m"])).stride(),
    "strides of heaviside": lambda sd: torch.heaviside(permuted(sd["m"]), sd["m"][:2]).stride(),
    "contiguous after conv1d": lambda sd: F.conv1d(sd["m"].T[None], sd["m"][None]).is_contiguous(),
    "conjugated by vdot": lambda sd: torch.vdot(sd["c"], sd["c"].conj()).is_conj(),
    "a model of one's own on meta": into_meta,
    "one's own on meta and a real one": lambda sd: torch.empty(3, device="meta") + sd["v"],
    "meta of one's own": lambda sd: [t.is_meta for t in (torch.empty(2, device="meta"), sd["w"])],
    "result on meta": lambda sd: sd["w"].to("meta").device.type,
    "tree_map": lambda sd: torch.utils._pytree.tree_map(lambda t: t + t, dict(sd)),
    "functional_call": lambda sd: torch.func.functional_call(
        nn.Linear(3, 2), {"weight": sd["w"], "bias": sd["v"][:2]}, (sd["p"],)
    ),
}

STRATEGIES = {
    **{f"each: {name}": function for name, function in ANSWERS.items()},
    **{
        f"w: {name}": functools.partial(lambda function, sd: function(sd["w"]), function)
        for name, function in OF_W.items()
    },
    **OF_ALL,
}


def test_the_state_of_a_random_generator(path: Path, tmp_path: Path) -> None:
    """torch does not say that it is on meta, but that it is no ByteTensor."""
    generator = torch.Generator().manual_seed(7)
    save({"rng": generator.get_state(), "w": torch.ones(2)}, tmp_path / "a")
    drawn = torch.rand(3, generator=generator)

    def draw(checkpoint: Any) -> Any:
        return torch.rand(3, generator=torch.Generator().set_state(checkpoint["rng"]))

    assert_same(load(tmp_path / "a", draw), drawn)


def outcome(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as err:
        return type(err)


def comparable(value: Any) -> Any:
    return value.state_dict() if isinstance(value, nn.Module) else value


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fusion") / "a.ckpt"
    path.write_bytes(as_bytes({"state_dict": HELD, "optimizer_states": [torch.ones(9)]}))
    return path


@pytest.mark.filterwarnings("ignore")  # of what torch thinks of some of these functions
@pytest.mark.parametrize("name", STRATEGIES)
def test_fusion_of(name: str, path: Path) -> None:
    strategy = STRATEGIES[name]
    expected = comparable(outcome(lambda: strategy(weights(load(path)))))
    assert_same(comparable(outcome(lambda: pipe(path, load, weights, strategy))), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda sd, path: torch.save(dict(sd), path),
        lambda sd, path: save(dict(sd), path),
        lambda sd, path: path.write_bytes(pickle.dumps({k: t.tolist() for k, t in sd.items()})),
        lambda sd, path: np.save(path.open("wb"), sd["w"].numpy()),
        lambda sd, path: path.write_text(f"{sd}"),
        lambda sd, path: in_pool(lambda item: torch.save(item, path), [sd["w"]]),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_a_strategy_writes(write, path: Path, tmp_path: Path) -> None:
    def writing(sd: Any) -> bytes:
        write(sd, tmp_path / "written")
        return (tmp_path / "written").read_bytes()

    held = weights(load(path))
    assert load(path, weights, writing) == writing(held)


def test_a_pool_that_was_there_before(path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        assert load(path, weights, lambda sd: pool.submit(repr, sd["n"]).result()) == "tensor(3)"
        assert load(path, lambda c: pool.submit(len, "none of it").result()) == 10


def test_a_load_in_a_strategy_starts_its_own_threads(http_server) -> None:
    large = {"w": torch.ones(500_000), "other": torch.ones(1_000_000)}
    uri = http_server.put("a.ckpt", as_bytes(large))
    second = http_server.put("b.ckpt", as_bytes(large))

    def mean(checkpoint: Any) -> torch.Tensor:
        return (checkpoint["w"] + load(second, lambda c: c["w"])) / 2

    assert torch.equal(load(uri, mean), torch.ones(500_000))
    assert sent_for("a.ckpt", http_server) < 2_000_000 * 1.02 + 1024**2


def sent_for(name: str, http_server: servers.HTTPServer) -> int:
    return sum(each.bytes_sent for each in http_server.log if name in each.path)


def test_threads_start_as_before_after_a_load(path: Path) -> None:
    before = threading.Thread.start, ThreadPoolExecutor.submit
    seen: list[Any] = []

    def nested(sd: Any) -> Any:
        seen.append(threading.Thread.start)
        load(path, weights)
        assert threading.Thread.start is seen[-1]

    pipe(path, load, weights, nested)
    assert seen[0] is not before[0]
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == before


def test_what_a_strategy_calls_first_is_compiled_ever_after(path: Path) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    try:
        double = torch.compile(lambda x: x * 2, backend=backend, fullgraph=True)
    except RuntimeError as err:
        pytest.skip(f"{err}")  # for this Python
    expected = load(path, weights)["w"] * 2
    assert_same(load(path, lambda checkpoint: double(checkpoint["state_dict"]["w"])), expected)
    assert len(graphs) == 1
    assert_same(double(expected), expected * 2)


def test_what_another_puts_in_place_of_a_start_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(checkpoint: Any) -> None:
        monkeypatch.setattr(threading.Thread, "start", mine)

    def mine(thread: threading.Thread) -> None:
        raise AssertionError

    pipe(path, load, replaced)
    assert threading.Thread.start is mine


def test_no_thread_that_was_refused_is_listed(path: Path) -> None:
    load(path, weights, lambda sd: in_thread(repr, sd["w"]))
    assert threading.enumerate() == [each for each in threading.enumerate() if each.ident]


class Reader:
    """Looks at what it holds when it is built from a pickle."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.text = tensor, ""

    def __setstate__(self, state: Any) -> None:
        self.tensor, self.text = state["tensor"], repr(state["tensor"])


def test_code_of_a_trusted_checkpoint_sees_values(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(as_bytes({"r": Reader(torch.ones(2)), "w": torch.ones(3)}))
    assert load(tmp_path / "a.ckpt", trust=[Reader])["r"].text == "tensor([1., 1.])"


def test_a_bare_storage_is_never_hollow(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(as_bytes({"s": torch.arange(3.0).untyped_storage()}))
    assert load(tmp_path / "a.ckpt", lambda c: str(c["s"].device)) == "cpu"


def draws(sd: Any) -> Any:
    """Draw from each shared generator, before and after it asks for values."""
    first = [torch.rand(2), random.random(), np.random.rand()]  # noqa: NPY002 - the shared one
    noise = sd["w"] + torch.randn_like(sd["w"]) + sd["n"].item() + random.random()
    return first, noise, noise.sum().item()


def test_a_strategy_draws_as_in_one_run(path: Path) -> None:
    def drawn(run: Callable[[], Any]) -> Any:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - likewise
        return run(), draws(HELD)

    assert_same(
        drawn(lambda: load(path, weights, draws)), drawn(lambda: draws(weights(load(path))))
    )


def test_a_generator_of_numpy_is_not_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.random")
    rewind, expected = random_states(), random.random()
    rewind()
    assert random.random() == expected


# ── frugality ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def counters(http_server) -> str:
    """Counters between weights of 2 MB, 20 MB in all."""
    held = {}
    for i in range(10):
        held |= {f"n{i}": torch.tensor(i), f"w{i}": torch.full((500_000,), float(i))}
    return http_server.put("a.ckpt", as_bytes(held))


def copied(checkpoint: Any) -> Any:
    one, other = checkpoint["w1"].clone(), checkpoint["w2"].clone()
    one.requires_grad = True
    torch._foreach_mul_([other], 2)
    return one.requires_grad, other.shape


@pytest.mark.parametrize(
    ("strategy", "megabytes"),
    [
        (lambda c: c["w1"] if c["n3"].item() == 3 else None, 2),
        (lambda c: c["w2"] if c["n3"] > 2 and (c["n4"] + c["n5"]).tolist() == 9 else None, 2),
        (lambda c: [sum(c[f"n{i}"].item() for i in range(10)), f"{c['n2']:02d}"], 0),
        (lambda c: {k: t for k, t in c.items() if t.numel() > 1 and k[1:] == str(int(c["n7"]))}, 2),
        (lambda c: c["w4"].sum().item(), 2),
        (lambda c: weights(load_into_real(c["w5"], c["w6"])), 4),
        (copied, 0),
        (lambda c: [c["w1"].device, c["w1"].is_meta, c["w2"].type(), c["w3"].cpu().shape], 0),
    ],
)
def test_what_is_asked_for_costs_its_record(strategy, megabytes, counters, http_server) -> None:
    result = load(counters, strategy)
    assert http_server.bytes_sent < megabytes * 1_000_000 * 1.02 + 1024**2
    assert_same(result, strategy(load(counters)))


def load_into_real(*tensors: torch.Tensor) -> Any:
    model = nn.ParameterList([torch.zeros(500_000) for _ in tensors])
    model.load_state_dict({str(i): tensor for i, tensor in enumerate(tensors)})
    return {name: value.detach() for name, value in model.state_dict().items()}


def test_a_mistake_in_a_strategy_moves_nothing(counters, http_server) -> None:
    for mistake in (lambda c: c["typo"], lambda c: c["w1"].reshape(2, -1).missing):
        with pytest.raises((KeyError, AttributeError)):
            load(counters, mistake)
    assert http_server.bytes_sent < 1024**2


def test_a_flag_among_many_small_records_costs_its_own(http_server) -> None:
    small = {f"w{i}": torch.full((16_000,), float(i)) for i in range(100)}  # 64 kB each
    uri = http_server.put("a.ckpt", as_bytes({**small, "flag": torch.tensor(True)}))
    assert load(uri, lambda c: c["w1"].shape if c["flag"].item() else None) == (16_000,)
    assert http_server.bytes_sent < 1024**2


def test_all_values_are_asked_for_in_few_rounds(counters) -> None:
    rounds = []

    def total(checkpoint: Any) -> float:
        rounds.append(1)
        return sum(float(t.sum()) for t in checkpoint.values())

    assert load(counters, total) == 45 + 45 * 500_000
    assert len(rounds) == 4  # a small one, all small ones, one large one with what is left


def test_what_hangs_in_an_old_cycle_is_not_needed(counters, http_server) -> None:
    def cyclic(checkpoint: Any) -> Any:
        loop: list[Any] = [checkpoint]
        loop.append(loop)
        young = [[] for _ in range(20_000)]  # which make an old object of the loop
        return checkpoint["w1"], len(young)

    assert load(counters, cyclic)[1] == 20_000
    assert http_server.bytes_sent < 2_000_000 * 1.02 + 1024**2


def test_a_real_tensor_is_not_written_into_before_the_values_are_there(path: Path) -> None:
    real, seen = torch.full((3,), 7.0), []

    def written(sd: Any) -> torch.Tensor:
        seen.append(real.numpy().tolist())
        return real.add_(sd["v"])

    pipe(path, load, weights, written)
    assert seen == [[7, 7, 7]] * 2
    assert real.tolist() == [7.25, 6.5, 8]


def test_an_error_of_a_strategy_comes_as_it_is(path: Path) -> None:
    class Stop(BaseException):
        pass

    def stopped(checkpoint: Any) -> None:
        raise Stop

    def wrong(sd: Any) -> Any:
        return sd["w"].reshape(7)

    with pytest.raises(Stop):
        load(path, stopped)
    with pytest.raises(
        RuntimeError, match=r"shape '\[7\]' is invalid for input of size 6"
    ) as caught:
        load(path, weights, wrong)
    assert caught.value.__context__ is None
    with pytest.raises(KeyError):
        load(path, weights, lambda sd: sd[sd["n"].item()])


def test_a_tensor_of_ones_own_on_meta_stays_there(path: Path) -> None:
    assert load(path, lambda c: torch.empty(2, device="meta")).is_meta
    assert load(path, weights, lambda sd: torch.empty_like(sd["w"], device="meta")).is_meta
