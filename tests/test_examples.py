"""What README, docstrings and examples show is true."""

import copy
import doctest
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import hydra
import nbclient
import nbformat
import omegaconf
import pytest
import requests
import torch

import _anemoi_ckpt.places
import anemoi_ckpt
import needs
import servers
import strategies
from anemoi_ckpt import (
    CheckpointNotFoundError,
    list_objects,
    load,
    main,
    metadata,
    remove_object,
    save,
)
from checkpoints import as_bytes, assert_same

ROOT = Path(anemoi_ckpt.__file__).parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:<!-- test: (\w+) -->\n)?```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    "name",
    [
        *("anemoi_ckpt", "strategies"),
        *(
            ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in (ROOT / "_anemoi_ckpt").rglob("*.py")
            if path.stem != "__init__" and ">>> " in path.read_text("utf-8")
        ),
    ],
)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", ["anemoi_ckpt", "strategies"])
def test_every_public_function_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert [public for public in module.__all__ if not getattr(module, public).__doc__] == []


BY_GETATTR: dict[str, list[str]] = {"anemoi_ckpt": ["__version__", "strategies"], "strategies": []}


@pytest.mark.parametrize("name", ["anemoi_ckpt", "strategies"])
def test_a_shell_completes_public_names_alone(name: str) -> None:
    module = importlib.import_module(name)
    assert dir(module) == sorted({*module.__all__, *BY_GETATTR[name]})


class Indices:
    """As Anemoi's IndexCollection: unknown where the checkpoint is opened."""

    def __init__(self) -> None:
        self.name_to_index = {"t_850": 0}


@pytest.fixture
def stores(s3, gcs, azure) -> Callable[[str], str]:
    """All three, and what puts their places in the place of README's."""
    s3.sdk.create_bucket(Bucket="bucket")

    def placed(text: str) -> str:
        text = text.replace("gs://bucket/", gcs.uri(""))
        return text.replace("az://container/", azure.uri(""))

    return placed


def test_readme(  # noqa: PLR0913, PLR0917 - all places that README names
    s3,
    gcs,
    stores: Callable[[str], str],
    http_server: servers.HTTPServer,
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:
    """Runs all blocks but those that have a test of their own, one after the other."""
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 4), "head": torch.nn.Linear(4, 1)})
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    scheduler.step()
    checkpoint = {
        "state_dict": dict(copy.deepcopy(model).state_dict()),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "epoch": 3,
        "hyper_parameters": {
            "data_indices": {"data": Indices()},
            "config": omegaconf.OmegaConf.create({"training": {"lr": 0.1}}),
        },
    }
    gcs.write("run/last.ckpt", as_bytes(checkpoint))
    for key in ("run/inference-last.ckpt", "run/last.ckpt", "last.ckpt"):
        s3.sdk.put_object(Bucket="bucket", Key=key, Body=with_metadata(checkpoint))
    for name in ("last.ckpt", "pretrained.ckpt"):
        http_server.put(name, as_bytes(checkpoint))
    scope: dict[str, Any] = {
        "boto3": boto3,
        "session": requests.Session(),
        "token": "t",
        "uri": "s3://bucket/last.ckpt",
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
    }
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    torch.save(model, "inference-last.ckpt")
    exec("from strategies import warm_start", scope)
    for mark, block in BLOCKS:
        if not mark:
            exec(stores(block.replace("https://host", http_server.url)), scope)
    assert scope["checkpoint"].keys() == checkpoint.keys() - {"optimizer_states", "lr_schedulers"}
    assert_same(scope["checkpoint"]["state_dict"], checkpoint["state_dict"])
    assert_same(scope["state_dict"], checkpoint["state_dict"])
    assert_same(scope["last"], checkpoint["state_dict"]["head.weight"])
    assert {t.dtype for t in scope["half"].values()} == {torch.float16}
    assert list(scope["encoder"]) == ["encoder.weight", "encoder.bias"]
    assert scope["report"].restored == ("optimizer", "scheduler")
    assert_same(load(stores("az://container/weights.safetensors")), {**checkpoint["state_dict"]})
    assert scope["held"]["data_indices"]["data"].name_to_index["t_850"] == 0
    assert scope["held"]["config"].training.lr == 0.1
    assert metadata("s3://bucket/run/light.ckpt")["run_id"] == "5f2c"
    commands = re.findall(r"^anemoi-ckpt (.*)$", README, re.MULTILINE)
    for command in commands:
        assert main(shlex.split(stores(command), comments=True)) == 0, capsys.readouterr().err
    assert len(commands) == 10
    assert load("light.safetensors")["head.weight"].dtype is torch.bfloat16
    assert list(load(stores("gs://bucket/encoder.ckpt"), strategies.weights)) == [
        "encoder.weight",
        "encoder.bias",
    ]


def with_metadata(checkpoint: Any) -> bytes:
    data = io.BytesIO(as_bytes(checkpoint))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("archive/anemoi-metadata/anemoi.json", json.dumps({"run_id": "5f2c"}))
    return data.getvalue()


def test_readme_hydra(s3, stores: Callable[[str], str]) -> None:
    state = {"encoder.w": torch.ones(3), "decoder.w": torch.ones(4)}
    checkpoint = {"epoch": 3, "state_dict": state, "optimizer_states": [torch.ones(9)]}
    s3.sdk.put_object(Bucket="bucket", Key="run/last.ckpt", Body=as_bytes(checkpoint))
    first, second, callback = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    result = hydra.utils.instantiate(omegaconf.OmegaConf.create(first))
    assert_same(result, {"epoch": 3, "state_dict": {"encoder.w": torch.ones(3)}})
    strategy = hydra.utils.instantiate(omegaconf.OmegaConf.create(second))(
        {"decoder.w": torch.zeros(4)}
    )
    assert strategy(checkpoint)["state_dict"].keys() == {"decoder.w"}
    transfer = (ROOT / "examples/anemoi_training/checkpoint/transfer.yaml").read_text()
    (shipped,) = omegaconf.OmegaConf.create(transfer).diagnostics.callbacks
    shown = omegaconf.OmegaConf.create(callback)
    assert shown.recipe == shipped.recipe
    needs.package("lightning.pytorch", "pip install lightning")
    assert hasattr(hydra.utils.instantiate(shown), "on_fit_start")  # a callback of Lightning's


def test_readme_names_every_strategy() -> None:
    assert [name for name in strategies.__all__ if f"`{name}" not in README] == []


def test_readme_lightning(stores, tmp_path: Path, monkeypatch) -> None:
    lightning = needs.package("lightning.pytorch", "pip install lightning")
    (text,) = [block for mark, block in BLOCKS if mark == "lightning"]
    module = importlib.import_module("lightning.pytorch.demos.boring_classes").BoringModel()
    monkeypatch.chdir(tmp_path)
    for entry in list_objects("s3://bucket/run/"):  # of other tests
        remove_object(entry.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = lightning.Trainer(max_epochs=1, logger=False, accelerator="cpu")
        first.fit(module)
        save(load(next(tmp_path.rglob("*.ckpt"))), "s3://bucket/run/first.ckpt")
        scope: dict[str, Any] = {"__name__": "readme", "module": module}
        text = text.replace("Trainer(", "Trainer(max_epochs=2, logger=False, accelerator='cpu', ")
        exec(compile(text, "README.md", "exec", dont_inherit=True), scope)
    assert scope["trainer"].current_epoch == 2
    found = load("s3://bucket/run/epoch=1-step=128.ckpt")
    assert_same(dict(found["state_dict"]), dict(module.state_dict()))


def test_readme_place_of_ones_own() -> None:
    fsspec = needs.package("fsspec", "pip install fsspec")
    (text,) = [block for mark, block in BLOCKS if mark == "fsspec"]
    checkpoint = {"state_dict": {"w": torch.arange(500_000.0)}, "optimizer_states": torch.ones(9)}
    fsspec.filesystem("memory").pipe_file("/run/last.ckpt", as_bytes(checkpoint))
    scope: dict[str, Any] = {"__name__": "readme"}
    try:
        exec(compile(text.replace("smb", "memory"), "README.md", "exec", dont_inherit=True), scope)
        assert_same(load("memory://run/last.ckpt"), checkpoint)
        last = load("memory://run/last.ckpt", lambda c: c["optimizer_states"])
        assert_same(last, torch.ones(9))
        with pytest.raises(CheckpointNotFoundError, match="memory://run/nothing"):
            load("memory://run/nothing.ckpt")
    finally:
        _anemoi_ckpt.places._PARSERS.pop("memory", None)


def test_readme_names_what_there_is() -> None:
    for name in anemoi_ckpt.__all__:
        if name.endswith("Error") and name != "CheckpointError":
            assert f"| `{name}` | `{getattr(anemoi_ckpt, name).__mro__[2].__name__}` |" in README
    assert "@@" not in README


def test_quickstart() -> None:
    done = subprocess.run(
        [sys.executable, "examples/quickstart.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    moved, stored = re.search(r"moved ([\d.]+) MB of ([\d.]+) MB stored", done.stdout).groups()
    assert 0.3 < float(moved) / float(stored) < 0.36


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("average", "averaged 10 tensors of 5 checkpoints\nmoved 10[0-9.]+ MB of 31[0-9.]+ MB"),
        ("custom_place", "'epoch': 3}\nthe archive has no such file"),
        ("hydra_config", r"loaded 1 +weight\n(.*\n)*renamed 1 +model.weight → weight"),
        ("lightning_resume", "went on at step 8, and came to step 12"),
        (
            "verify_run",
            r"(.*\n)*epoch=4.* do not match .*\n.*whole\n1 of 6 checkpoints are",
        ),
        ("transfer_anemoi", r"(.*\n)*aligned \d+ .*\n(.*\n)*.* 1 new: q_700\n"),
    ],
)
@pytest.mark.timeout(1800)  # one of them trains
def test_examples(name: str, said: str) -> None:
    if name == "transfer_anemoi":
        needs.anemoi()
    if name == "verify_run":
        needs.package("distributed", "pip install distributed")
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout)
    if name == "transfer_anemoi":
        known, scratch, transferred, further = map(float, re.findall(r"loss ([\d.]+)", done.stdout))
        assert max(known, transferred, further) < scratch / 5


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
def test_notebook() -> None:
    """It runs, and shows what is kept in it, but for ports, times and the torch that wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        kept = nbformat.read(ROOT / "examples/notebook.ipynb", 4)
        made = copy.deepcopy(kept)
        folder = {"metadata": {"path": str(ROOT / "examples")}}
        nbclient.NotebookClient(made, timeout=None, resources=folder).execute()
    shown = [outputs_of(notebook) for notebook in (kept, made)]
    assert shown[0] == shown[1]
    assert sum("<table" in output for output in shown[0]) == 2


def outputs_of(notebook: Any) -> list[str]:
    texts = [
        json.dumps(output.get("text") or output.get("data"), sort_keys=True)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    changing = r"127\.0\.0\.1:\d+|in \d+\.\d+ s|torch 2\.\d or later|Adam or (?=AdamW)"
    return [re.sub(changing, "", text) for text in texts]
