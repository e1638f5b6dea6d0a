"""What README, docstrings and examples show is true."""

import copy
import doctest
import importlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
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
from pages import ALL, PAGES, ROOT, fences, marked


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


@pytest.fixture
def shown(  # noqa: PLR0913, PLR0917 - all places that the pages name
    s3, gcs, stores, http_server, tmp_path: Path, monkeypatch
) -> dict[str, Any]:
    """The checkpoints that the pages name, and the names that they leave open."""
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
    data = as_bytes(checkpoint)
    gcs.write("run/last.ckpt", data)
    for key in ("run/inference-last.ckpt", "run/last.ckpt", "last.ckpt"):
        s3.sdk.put_object(Bucket="bucket", Key=key, Body=with_metadata(checkpoint))
    for name in ("last.ckpt", "pretrained.ckpt"):
        http_server.put(name, data)
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/last.ckpt").write_bytes(data)
    torch.save(model, "inference-last.ckpt")
    return {
        "session": requests.Session(),
        "token": "t",
        "uri": "s3://bucket/last.ckpt",
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "kept": checkpoint,
    }


ENCODER = ["encoder.weight", "encoder.bias"]
PROVEN: dict[str, Callable[[dict[str, Any]], bool]] = {
    "README.md": lambda scope: scope["report"].missing == () and list(scope["encoder"]) == ENCODER,
    "docs/index.md": lambda scope: scope["report"].loaded == tuple(scope["state_dict"]),
    "docs/tutorial.md": lambda scope: scope["report"].restored == ("optimizer",),
    "docs/how-to/convert.md": lambda _: metadata("s3://bucket/run/light.ckpt")["run_id"] == "5f2c",
    "docs/how-to/files.md": lambda scope: (
        scope["path"].read_bytes() == Path("run/last.ckpt").read_bytes()
    ),
    "docs/how-to/inspect.md": lambda scope: "plan" in scope,
    "docs/how-to/models.md": lambda scope: scope["report"].restored == ("optimizer", "scheduler"),
    "docs/how-to/networks.md": lambda scope: "load" in scope,
    "docs/how-to/places.md": lambda scope: scope["entry"].size > 0,
    "docs/how-to/ranks.md": lambda scope: list(scope["state_dict"])[:2] == ENCODER,
    "docs/how-to/strategies.md": lambda scope: (
        {t.dtype for t in scope["half"].values()} == {torch.float16}
        and torch.equal(scope["last"], scope["kept"]["state_dict"]["head.weight"])
        and list(scope["encoder"]) == ENCODER
    ),
    "docs/how-to/trust.md": lambda scope: scope["held"]["config"].training.lr == 0.1,
    "docs/reference/functions.md": lambda scope: "load" in scope,
    "docs/reference/strategies.md": lambda scope: "weights" in scope,
}


def test_every_page_with_code_is_run() -> None:
    with_code = {
        name
        for name, text in PAGES.items()
        if any(language == "python" and not mark for mark, language, _ in fences(text))
    }
    assert with_code == PROVEN.keys()


@pytest.mark.parametrize("page", PROVEN)
def test_page(page: str, shown, stores, http_server, capsys) -> None:
    """Runs its blocks one after the other, but those that have a test of their own."""
    before = ""
    for mark, language, text in fences(PAGES[page]):
        if language == "python" and not mark:
            capsys.readouterr()
            exec(stores(text.replace("https://host", http_server.url)), shown)
            before = capsys.readouterr().out
        elif language == "text" and page == "docs/tutorial.md":
            assert settled(before) == settled(text)
    assert PROVEN[page](shown)


def settled(text: str) -> list[str]:
    """Give what a program printed without what the versions of Python and torch change."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return [re.sub(r"[0-9.]+ k?B|torch .*|Adam or |; is it one of .*", "", line) for line in lines]


def test_commands(shown, stores, capsys) -> None:
    shells = "".join(text for _, language, text in fences(ALL) if language == "bash")
    commands = re.findall(r"^anemoi-ckpt (.*)$", shells, re.MULTILINE)
    for command in commands:
        assert main(shlex.split(stores(command), comments=True)) == 0, capsys.readouterr().err
    assert len(commands) == 10
    assert load("light.safetensors")["head.weight"].dtype is torch.bfloat16
    names = list(load(stores("gs://bucket/encoder.ckpt"), strategies.weights))
    assert names == ENCODER
    listed = re.findall(r"^    (\w+) ", PAGES["docs/reference/shell.md"], re.MULTILINE)
    assert {command.split()[0] for command in commands} < set(listed)
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", printed, re.MULTILINE) for name in listed)


def with_metadata(checkpoint: Any) -> bytes:
    data = io.BytesIO(as_bytes(checkpoint))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("archive/anemoi-metadata/anemoi.json", json.dumps({"run_id": "5f2c"}))
    return data.getvalue()


def test_readme_hydra(s3, stores: Callable[[str], str]) -> None:
    state = {"encoder.w": torch.ones(3), "decoder.w": torch.ones(4)}
    checkpoint = {"epoch": 3, "state_dict": state, "optimizer_states": [torch.ones(9)]}
    s3.sdk.put_object(Bucket="bucket", Key="run/last.ckpt", Body=as_bytes(checkpoint))
    pages = ("docs/how-to/hydra.md", "docs/how-to/anemoi.md")
    blocks = [block for page in pages for block in fences(PAGES[page])]
    first, second, callback = (text for _, language, text in blocks if language == "yaml")
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
    assert [
        name for name in strategies.__all__ if f"`{name}" not in PAGES["docs/how-to/strategies.md"]
    ] == []


def test_readme_lightning(stores, tmp_path: Path, monkeypatch) -> None:
    lightning = needs.package("lightning.pytorch", "pip install lightning")
    text = marked("lightning")
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
    text = marked("fsspec")
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
            assert f"| `{name}` | `{getattr(anemoi_ckpt, name).__mro__[2].__name__}` |" in ALL
    assert "@@" not in ALL


@pytest.mark.parametrize("name", ["Contents", "Tree", "Plan", "Difference", "Verified", "Report"])
def test_the_page_of_results_says_what_each_attribute_has(name: str) -> None:
    _, _, page = PAGES["docs/reference/results.md"].partition(f"| Attribute of `{name}` ")
    rows = re.findall(r"^\| `(\w+)` \|", page.partition("\n\n")[0], re.MULTILINE)
    assert rows == [each.name for each in attrs.fields(getattr(anemoi_ckpt, name))]


def test_every_public_name_is_in_the_reference() -> None:
    reference = "".join(text for name, text in PAGES.items() if "/reference/" in name)
    names = [n for n in anemoi_ckpt.__all__ if n != "main"]  # the command line, which has a page
    assert all(re.search(rf"anemoi_ckpt\.{n}\b|`{n}`", reference) for n in names)


def test_the_figures_are_those_that_were_measured() -> None:
    figures = runpy.run_path(str(ROOT / "docs/figures.py"))
    assert figures["speed"]() == (ROOT / "docs/images/speed.svg").read_text("utf-8")
    entries = json.loads((ROOT / "docs/figures/load.json").read_text("utf-8"))
    for entry in entries:
        _, page = PAGES["docs/figures.md"].split(f"**{entry['scenario']}**")
        row = f"| {entry['competitor']} | {entry['seconds']:.2f} |"
        assert row in page.split("**")[0]
    assert len(entries) == 25


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


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("hydra_config", "hydra", "hydra-core"),
        ("lightning_resume", "lightning", "lightning"),
        ("transfer_anemoi", "anemoi.models", "anemoi-models"),
        ("verify_run", "distributed", "distributed"),
    ],
)
def test_an_example_says_what_it_needs(name: str, package: str, install: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"^this example needs .*: pip install {install}$"):
        runpy.run_path(str(ROOT / f"examples/{name}.py"))


def test_each_example_says_in_its_first_line_what_it_needs() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert re.search(r"Needs [\w -]+\.", path.read_text("utf-8").splitlines()[0]), path


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
