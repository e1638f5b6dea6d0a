"""Checkpoints to load in tests, and an equality that forgives nothing.

`python tests/checkpoints.py FILE` writes the one that tests against a real HTTP place read.
"""

import functools
import io
import logging
import math
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# The version that the layout tells, of what the running torch writes.
WRITER = "2.7 or later" if torch.__version__ >= (2, 7) else "2.1 or later"

_ALIGNMENT_BYTES = 64  # torch's own: storages start at multiples of it


def as_bytes(obj: object, **kw: Any) -> bytes:
    """What `torch.save(obj, file, **kw)` writes."""
    buffer = io.BytesIO()
    torch.save(obj, buffer, **kw)
    return buffer.getvalue()


# ---------------------------------------------------------------------- a real Lightning checkpoint


def lightning_checkpoint(tmp_path: Path) -> Path:
    """`last.ckpt` in `tmp_path`: a checkpoint of some 6 MB, by a real Lightning Trainer with AdamW.

    The weights are a third of it; the rest is AdamW's `exp_avg` and `exp_avg_sq`.
    """
    path = tmp_path / "last.ckpt"
    path.write_bytes(_lightning_bytes())
    return path


def quiet_trainer(**kw: Any) -> Any:
    """A Lightning Trainer on the CPU that shows nothing, and writes nothing by itself."""
    import lightning

    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kw,
    )


@functools.cache
def _lightning_bytes() -> bytes:
    import lightning  # two seconds, for the tests that need it

    class Net(lightning.LightningModule):
        def __init__(self, width: int = 512, lr: float = 1e-3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(
                nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
            )
            self.lr = lr

        def training_step(self, samples: list[Tensor], batch_idx: int) -> Tensor:
            del batch_idx
            (batch,) = samples
            loss: Tensor = (self.model(batch) - batch).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")  # about having no validation, no workers, few batches
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        torch.manual_seed(0)
        trainer = quiet_trainer(max_steps=3, default_root_dir=folder)
        samples = torch.utils.data.TensorDataset(torch.randn(12, 512))
        trainer.fit(Net(), torch.utils.data.DataLoader(samples, batch_size=4))
        path = Path(folder) / "last.ckpt"
        trainer.save_checkpoint(path)
        return path.read_bytes()


# ----------------------------------------------------------------------- everything that is awkward


def odd_checkpoint() -> dict[str, Any]:
    """Every kind of tensor and container that a checkpoint may hold and that needs care.

    The same every time, and loadable by `torch.load(weights_only=True)`.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    tied = nn.Parameter(normal(7, 5))
    base = normal(6, 8)
    wave = normal(3, 4, dtype=torch.complex64)
    state_dict = OrderedDict(
        {
            "decoder.weight": tied,  # before encoder.weight: insertion order is no sorted order
            "encoder.weight": tied,
            "frozen": nn.Parameter(normal(4), requires_grad=False),
            "buffer": getattr(nn, "Buffer", nn.Parameter)(normal(3)),  # since torch 2.5
            "requires_grad": normal(2, 2).requires_grad_(),
            "base": base,
            "row": base[2],
            "column": base[:, 3],
            "inner": base[1:4, 2:7],
            "transposed": base.t(),
            "every_other": base[::2, ::3],
            "detached": tied.detach(),
            "only_a_view": normal(100)[40:50],  # whose storage nothing else refers to
            "expanded": normal(1, 3).expand(4, 3),
            "channels_last": normal(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            "scalar": torch.tensor(3.5),
            "scalar_view": base[0, 0],
            "empty": torch.empty(0),
            "empty_shaped": torch.empty(3, 0, 2),
            "empty_view": base[6:],
            "float8_e4m3fn": normal(9).to(torch.float8_e4m3fn),
            "float8_e5m2": normal(9).to(torch.float8_e5m2),
            "bfloat16": normal(5, 5).bfloat16(),
            "float16": normal(5).half(),
            "float64": normal(5, dtype=torch.float64),
            "not_a_number": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
            "complex64": wave,
            "complex128": normal(2, dtype=torch.complex128),
            "conj": wave.conj(),
            "conj_transposed": wave.mH,
            # Not of `wave`: torch does not save one storage under two dtypes.
            "neg": normal(3, dtype=torch.complex64).conj().imag,
            "real_part": normal(3, dtype=torch.complex64).real,
            "bool": normal(11) > 0,
            "uint8": torch.arange(5, dtype=torch.uint8),
            "int64": torch.arange(5) - 2,
            "uint16": torch.arange(5).to(getattr(torch, "uint16", torch.uint8)),  # since torch 2.3
            "sparse_coo": _sparse_coo(normal(4)),
            "sparse_coalesced": _sparse_coo(normal(4), is_coalesced=True),
            "sparse_csr": _sparse_csr(normal(4)),
        }
    )
    return {
        "epoch": 3,
        "global_step": 2**40,
        "state_dict": state_dict,
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(7.0), "exp_avg": normal(7, 5)}, 1: {}},
                "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}],
            }
        ],
        "again": {"the same dict": state_dict, "one tensor": [tied, base, tied]},
        "hyper_parameters": {
            "none": None,
            "nan": math.nan,
            "minus zero": -0.0,
            "complex": 1 - 2j,
            "text": "µ ≠ m",
            "bytes": b"\0\xff",
            "tuple": (1, (2.5, ["x"])),
            "set": {1, 2, 3},
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            "size": torch.Size([2, 3]),
            2: "a key that is no text",
        },
    }


def _sparse_coo(values: Tensor, *, is_coalesced: bool = False) -> Tensor:
    # Not coalesced, the first and the last value stand at the same place. Said rather than
    # done by coalesce(), which leaves bytes that nothing was ever written to behind the values.
    rows, columns = ([0, 1, 2, 2], [1, 0, 1, 3]) if is_coalesced else ([0, 1, 2, 0], [1, 0, 3, 1])
    return torch.sparse_coo_tensor(
        torch.tensor([rows, columns]),
        values,
        (3, 4),
        check_invariants=True,
        is_coalesced=is_coalesced,
    )


def _sparse_csr(values: Tensor) -> Tensor:
    rows, columns = torch.tensor([0, 2, 3, 4]), torch.tensor([0, 2, 1, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "CSR is in beta state", once a process
        return torch.sparse_csr_tensor(rows, columns, values, (3, 4), check_invariants=True)


# --------------------------------------------------------------------- the layout of older releases


class _WriteOnly:
    """A file that cannot seek, for which zipfile writes what torch writes: the sizes and the CRC
    stand behind the data (APPNOTE 4.3.9), and zero in the local header."""

    def __init__(self, buffer: io.BytesIO) -> None:
        self.write = buffer.write
        self.flush = buffer.flush


def lexicographic(data: bytes) -> bytes:
    """Rewrites what `torch.save` wrote into the layout of torch before 2.7.

    There the storages stand in the order of their keys as text (0, 1, 10, 11, …, 2), and the
    records `.format_version` and `.storage_alignment` are not there.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    storages = sorted(name for name in records if name.split("/")[1] == "data")
    dropped = (".format_version", ".storage_alignment")
    others = [name for name in records if name not in storages and not name.endswith(dropped)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(_WriteOnly(buffer), "w") as archive:  # type: ignore[call-overload] # ZipFile needs no more than write and flush
        # torch's order: the pickle, the byte order, the storages, the version and the id.
        for name in [*others[:2], *storages, *others[2:]]:
            info = zipfile.ZipInfo(name)
            info.extra = _padding(len(buffer.getvalue()) + 30 + len(name.encode()))
            archive.writestr(info, records[name])
            info.extra = b""  # in the local header only: a reader must not take it for granted
    return buffer.getvalue()


def _padding(offset: int) -> bytes:
    """An extra field that ends at an aligned offset; torch's has the id `FB` too."""
    size = -(offset + 4) % _ALIGNMENT_BYTES
    return b"FB" + size.to_bytes(2, "little") + b"Z" * size


# ----------------------------------------------------------------------------------------- equality


def assert_same(a: object, b: object) -> None:
    """Asserts that two checkpoints are the same bit for bit.

    Types, insertion order, what is shared with what (objects and storages), and of every tensor
    dtype, layout, shape, strides, offset, requires_grad, conj and neg bits, and its whole storage,
    also where no tensor shows it.  On the meta device all but the bytes.

    Raises:
        AssertionError: naming the first place that differs.
    """
    _Comparison().same(a, b, "checkpoint")


class _Comparison:
    def __init__(self) -> None:
        self._objects: dict[tuple[str, int], tuple[str, int]] = {}
        # Ids are unique only among the living; views made on the way must not die.
        self._alive: list[object] = []

    def same(self, a: Any, b: Any, where: str) -> None:
        assert type(a) is type(b), f"{where}: {type(a)} is not {type(b)}"
        if isinstance(a, Tensor | dict | list | np.ndarray) or _vars_of(a):
            if self._seen(a, b, where):
                return
            self.same_vars(a, b, where)
        if isinstance(a, Tensor):
            self._same_tensor(a, b, where)
        elif isinstance(a, dict | list | tuple):
            self._same_items(a, b, where)
        elif isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides), where
            assert a.tobytes() == b.tobytes(), f"{where}: arrays differ"
        elif isinstance(a, float | complex):
            assert repr(a) == repr(b), f"{where}: {a!r} is not {b!r}"  # also nan and -0.0
        elif not _vars_of(a):
            assert a == b, f"{where}: {a!r} is not {b!r}"

    def _same_items(self, a: Any, b: Any, where: str) -> None:
        keys, others = (list(a), list(b)) if isinstance(a, dict) else (range(len(a)), range(len(b)))
        assert keys == others, f"{where}: {keys} are not {others}"
        for key in keys:
            self.same(a[key], b[key], f"{where}[{key!r}]")

    def same_vars(self, a: object, b: object, where: str) -> None:
        mine, others = _vars_of(a), _vars_of(b)
        assert list(mine) == list(others), f"{where}: attributes {list(mine)} vs {list(others)}"
        for name in mine:
            self.same(mine[name], others[name], f"{where}.{name}")

    def _same_tensor(self, a: Tensor, b: Tensor, where: str) -> None:
        for name in ("dtype", "layout", "device", "shape", "requires_grad", "is_leaf"):
            mine, others = getattr(a, name), getattr(b, name)
            assert mine == others, f"{where}.{name}: {mine} is not {others}"
        a, b = a.detach(), b.detach()
        if a.layout == torch.sparse_coo:
            assert a.is_coalesced() == b.is_coalesced(), f"{where}: coalesced or not"
            parts = ["_indices", "_values"]
        elif a.layout in (torch.sparse_csr, torch.sparse_bsr):
            parts = ["crow_indices", "col_indices", "values"]
        elif a.layout in (torch.sparse_csc, torch.sparse_bsc):
            parts = ["ccol_indices", "row_indices", "values"]
        else:
            self._same_strided(a, b, where)
            return
        for part in parts:
            self._same_strided(getattr(a, part)(), getattr(b, part)(), f"{where}.{part}")

    def _same_strided(self, a: Tensor, b: Tensor, where: str) -> None:
        for name in ("dtype", "shape", "stride", "storage_offset", "is_conj", "is_neg"):
            mine, others = getattr(a, name), getattr(b, name)
            mine, others = (mine(), others()) if callable(mine) else (mine, others)
            assert mine == others, f"{where}.{name}: {mine} is not {others}"
        one, other = a.untyped_storage(), b.untyped_storage()
        self._alive += (one, other)
        assert one.nbytes() == other.nbytes(), f"{where}: {one.nbytes()} B, not {other.nbytes()} B"
        if not one.nbytes():  # torch.load does not keep track of what shares nothing
            return
        if self._met("storage", one._cdata, other._cdata, where) or a.device.type == "meta":
            return
        differ = (_raw(one) != _raw(other)).nonzero()
        assert not len(differ), (
            f"{where}: {len(differ)} of {one.nbytes()} B differ, the first at {int(differ[0])}"
        )

    def _seen(self, a: object, b: object, where: str) -> bool:
        self._alive += (a, b)
        return self._met("object", id(a), id(b), where)

    def _met(self, kind: str, mine: int, others: int, where: str) -> bool:
        """Whether this pair was compared before; no half of it may have met another half."""
        known = self._objects.get((f"{kind} a", mine)), self._objects.get((f"{kind} b", others))
        if known == (None, None):
            self._objects[f"{kind} a", mine] = ("b", others)
            self._objects[f"{kind} b", others] = ("a", mine)
            return False
        assert known == (("b", others), ("a", mine)), f"{where}: shares its {kind} with others"
        return True


def _vars_of(obj: object) -> dict[str, Any]:
    """The attributes of an object, those of a state dict (`_metadata`) included; of a class or a
    function none: those are the same or not."""
    return {} if callable(obj) and hasattr(obj, "__qualname__") else getattr(obj, "__dict__", {})


def _raw(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(as_bytes(odd_checkpoint()))
