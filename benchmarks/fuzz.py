"""Fuzz what reads archives: `pip install atheris`, then `python benchmarks/fuzz.py [SECONDS]`.

Only a `CheckpointError` may come out of `load`; anything else ends the run, and atheris writes
the file that did it beside. Guided by coverage, from one valid file of every format on. For hours
rather than for CI, where tests/test_hostile.py does the same with hypothesis.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import io
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

HOME = Path(__file__).resolve().parents[1]


class Unknown:
    """Stands for the classes that a pickle names."""


def state() -> dict[str, Any]:
    unknown = Unknown()
    vars(unknown).update(a=[torch.ones(2)], b={(1, "x"): unknown})
    dtype = np.dtype([("x", "<f4"), ("y", "S3")], metadata={"of": "it"})
    return {
        "w": torch.arange(300.0),
        "v": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t()),
        "sparse": [torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr()],
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "arrays": [np.zeros(2, dtype), np.array([1, None], object), np.float32(3)],
        "plain": [collections.deque([1]), collections.defaultdict(list), {1}, Path("x"), unknown],
    }


def seeds() -> list[bytes]:
    made = []
    for protocol, options in itertools.product((2, 4), ({}, _LEGACY)):
        out = io.BytesIO()
        torch.save(state(), out, pickle_protocol=protocol, **options)
        made.append(out.getvalue())
    torch.serialization.set_crc32_options(False)  # what is changed is read, then
    out = io.BytesIO()
    torch.save(state(), out)
    made.append(out.getvalue())
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 2)), out)
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return [*made, out.getvalue(), len(header).to_bytes(8, "little") + header + bytes(8)]


_LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}


def main() -> None:
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        raise SystemExit("fuzzing needs atheris: pip install atheris") from None
    sys.path.insert(0, str(HOME))
    rooms = ("formats", "hollow", "opening", "pickles", "planning")
    with atheris.instrument_imports(include=[f"_anemoi_ckpt.{room}" for room in rooms]):
        from anemoi_ckpt import CheckpointError, load

    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(seeds()):
            (corpus / str(number)).write_bytes(seed)
        path = Path(folder) / "a.ckpt"

        def try_one(data: bytes) -> None:
            path.write_bytes(data)
            with contextlib.suppress(CheckpointError):
                load(path)
                load(path, type)

        limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], *limits, str(corpus)], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
