"""Writes what a torch and a numpy write into checkpoints, and beside it what they read of that.

`python tests/data/write.py tests/data/torch-2.15` with the torch and numpy that the folder is
named for; nothing else needs to be installed.  What they do not know is left out.
"""

import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import importlib
import json
import pathlib
import sys
import types
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from described import described

# ------------------------------------------------- what is installed where it is written, not here


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    lr: float = 0.1


class Point(NamedTuple):
    x: int
    y: int


class Tagged(torch.Tensor):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.ModuleList([self.encoder])
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.encoder(x))


def hide() -> None:
    """Has the classes above pickled as those of a package that a reader does not have."""
    module = types.ModuleType("some_package")
    for kind in (Colour, Config, Point, Tagged, Net):
        kind.__module__ = "some_package"
        setattr(module, kind.__name__, kind)
    sys.modules["some_package"] = module


# --------------------------------------------------------------------------------------- the files


def views() -> Any:
    base = torch.arange(24.0).reshape(4, 6)
    tied = nn.Parameter(torch.randn(4, 4))
    noted = torch.randn(3)
    noted.note = "an attribute"
    return {
        "base": base,
        "transposed": base.t(),
        "row": base[1],
        "every_other": base[:, ::2],
        "strided": torch.as_strided(base, (2, 2), (7, 3), 1),
        "scalar": base[0, 0],
        "empty": base[:0],
        "zero": torch.empty(0),
        "expanded": torch.randn(1, 3).expand(5, 3),
        "channels_last": torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last),
        "tied": [tied, tied, tied.detach()],
        "frozen": nn.Parameter(torch.randn(2), requires_grad=False),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "neg": torch._neg_view(torch.randn(3)),
        "imaginary": torch.randn(3, dtype=torch.complex64).conj().imag,
        "meta": torch.empty(3, 4, device="meta"),
        "noted": noted,
    }


DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float8_e4m3fn", "float8_e5m2"),
)
WITHOUT_VALUES = ("float4_e2m1fn_x2", "uint1", "uint4", "int4")  # torch fills no tensors of them
NEWER_DTYPES = (  # than torch 2.2, which cannot save complex32
    *("uint16", "uint32", "uint64", "float8_e8m0fnu", "complex32"),
    *WITHOUT_VALUES,
)


def dtypes(names: tuple[str, ...]) -> Any:
    """Of each a tensor, and the dtype itself, as configurations have it."""
    kinds = {name: getattr(torch, name) for name in names if hasattr(torch, name)}
    values = torch.arange(6.0).reshape(2, 3)
    tensors = {name: values.to(kinds[name]) for name in kinds if name not in WITHOUT_VALUES}
    return {"tensors": tensors, "dtypes": kinds}


def sparse() -> Any:
    dense = torch.tensor([[0, 1.0], [2, 0]])
    return {
        "coo": dense.to_sparse(),
        "uncoalesced": torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2)),
        "hybrid": torch.sparse_coo_tensor([[0, 1]], [[1.0, 2.0], [3.0, 4.0]], (3, 2)),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "bsr": torch.eye(4).to_sparse_bsr((2, 2)),
        "bsc": torch.eye(4).to_sparse_bsc((2, 2)),
    }


def quantized() -> Any:
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    return {
        "tensor": torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 3, torch.quint8),
        "channel": torch.quantize_per_channel(torch.randn(2, 3), scales, zeros, 0, torch.qint8),
    }


def nested() -> Any:
    return {"w": torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])}


def arrays() -> Any:
    numbers = (*("f2", "f4", "f8", "i1", "i4", "i8", "u1", "u8", "c8", "c16"), *(">f4", ">i8", "?"))
    objects = np.empty(4, dtype=object)
    objects[:] = [1, "a", None, [2]]
    return {
        **{name: np.arange(6).reshape(2, 3).astype(name) for name in numbers},
        "long": np.arange(3, dtype=np.longdouble),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 3)),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "text": np.array(["a", "bcd"]),
        "bytes": np.array([b"a", b"bcd"]),
        "dates": np.array(["2020-01-01", "NaT"], "datetime64[ns]"),
        "spans": np.array([1, 2], "timedelta64[h]"),
        "objects": objects,
        "scalars": [np.float64(3), np.bool_(1), np.str_("abc"), np.datetime64("2020-01-02")],
        "dtypes": [np.dtype(name) for name in ("f4", "?", "U3", "M8[ns]", ">f8")],
        "type": np.float32,
    }


def structured_arrays() -> Any:
    aligned = np.dtype([("a", "i1"), ("b", "f8")], align=True)
    of_arrays = np.dtype([("position", "f4", (3,)), ("name", "U2")])
    return {
        "plain": np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")]),
        "aligned": np.array([(1, 2.5)], dtype=aligned),
        "of_arrays": np.array([((1, 2, 3), "ab")], dtype=of_arrays),
        "dtypes": [np.dtype([("a", "i4")]), aligned, of_arrays],
    }


def text_arrays() -> Any:
    kinds = np.dtypes.StringDType
    return {
        "text": np.array(["a", "some words that are longer"], dtype=kinds()),
        "missing": np.array(["a", None], dtype=kinds(na_object=None)),
    }


def python() -> Any:
    return {
        "containers": [{1, 2}, frozenset({3}), collections.deque([1, 2], 5), ((1, (2, [3])),)],
        "mappings": [collections.Counter("aab"), collections.defaultdict(list, {"a": [1]})],
        "paths": [pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("c:/x")],
        "times": [
            dt.date(2020, 1, 2),
            dt.datetime(2020, 1, 2, 3, 4, 5, 6, dt.UTC),
            dt.timedelta(1, 2, 3),
            dt.timezone(dt.timedelta(hours=2), "x"),
        ],
        "numbers": [2**100, -(2**40), 1 + 2j, float("inf"), decimal.Decimal("1.50")],
        "text": ["ü\n€", b"\0\xff", bytearray(b"abc")],
        "ranges": [range(1, 9, 2), slice(1, None, 2)],
        "spaces": [Namespace(a=1), types.SimpleNamespace(b=2)],
        "keys": {1: "a", (1, 2): "b", None: 0},
        "torch": [
            torch.Size([2, 3]),
            torch.device("cuda:1"),
            torch.strided,
            torch.per_tensor_affine,
        ],
        "extra_state": OrderedDict([("a.weight", torch.ones(2)), ("a._extra_state", {"k": 1})]),
    }


def foreign() -> Any:
    jagged = [torch.randn(2, 3), torch.randn(3, 3)]
    return {
        "classes": [Colour.RED, Config(), Point(1, 2), functools.partial(Config, lr=0.2), Colour],
        "version": torch.__version__,
        "subclass": torch.randn(3).as_subclass(Tagged),
        "lazy": nn.LazyLinear(3).state_dict(),
        "jagged": torch.nested.nested_tensor(jagged, layout=torch.jagged),
        "masked": np.ma.array([1, 2], mask=[0, 1]),
        "generators": [np.random.default_rng(3).bit_generator],
        "weight": torch.ones(2),
    }


def training() -> Any:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), amsgrad=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=10)
    return {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "rng": {"torch": torch.get_rng_state(), "numpy": np.random.RandomState(1).get_state()},
    }


def plain() -> Any:
    return {"a": torch.arange(10.0), "b": torch.ones(3, 3)}


FILES: dict[str, Callable[[], Any]] = {
    "views": views,
    "dtypes": functools.partial(dtypes, DTYPES),
    "newer_dtypes": functools.partial(dtypes, NEWER_DTYPES),
    "sparse": sparse,
    "quantized": quantized,
    "nested": nested,
    "arrays": arrays,
    "structured_arrays": structured_arrays,
    "text_arrays": text_arrays,
    "python": python,
    "foreign": foreign,
    "training": training,
    "module": Net,
    "legacy": lambda: {**views(), "module": Net().state_dict()},
    "without_crc": plain,
    "aligned_4096": plain,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "python": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
}


@contextlib.contextmanager
def set_up_for(name: str) -> Iterator[None]:
    """The settings of torch that a file is written with."""
    if name == "without_crc":
        torch.serialization.set_crc32_options(False)
        yield
        torch.serialization.set_crc32_options(True)
    elif name == "aligned_4096":
        save = importlib.import_module("torch.utils.serialization.config").save
        save.storage_alignment = 4096
        yield
        save.storage_alignment = 64
    else:
        yield


def write(path: Path, make: Callable[[], Any]) -> dict[str, str]:
    """Writes one file, and gives what torch itself reads of it."""
    torch.manual_seed(1)
    torch.save(make(), path, **OPTIONS.get(path.stem, {}))
    return described(torch.load(path, weights_only=False))


def write_torchscript(path: Path) -> dict[str, str]:
    module = torch.jit.script(nn.Sequential(nn.Linear(3, 2)))
    torch.jit.save(module, str(path))
    return described(dict(module.state_dict()))


def write_all(folder: Path) -> None:
    hide()
    folder.mkdir(parents=True, exist_ok=True)
    truth = {"torchscript": write_torchscript(folder / "torchscript.pt")}
    for name, make in FILES.items():
        try:
            with set_up_for(name):
                truth[name] = write(folder / f"{name}.pt", make)
        except (AttributeError, ImportError, KeyError) as err:
            print(f"{name}: this torch or numpy does not know it: {err}")  # noqa: T201 - a script
            (folder / f"{name}.pt").unlink(missing_ok=True)
    text = json.dumps(truth, indent=1, ensure_ascii=False)
    (folder / "truth.json").write_text(f"{text}\n", "utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of what torch is about to give up
    write_all(Path(sys.argv[1]))
