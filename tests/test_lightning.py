"""Lightning's Trainer resumes from any place, and writes to it: a real Trainer, real stores."""

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import _anemoi_ckpt.trainers.lightning
import _anemoi_ckpt.transport
import needs
import servers
from anemoi_ckpt import (
    CheckpointNotFoundError,
    MissingPackageError,
    UnreachableError,
    checkpoint_io,
    latest,
    list_objects,
    load,
)
from strategies import drop_optimizer

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
STORES = ["s3", "gcs", "azure"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)


@pytest.fixture(params=PACKAGES)
def lightning(request) -> Any:
    return needs.package(request.param, "pip install lightning pytorch-lightning")


def module(lightning: Any) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 1)
            self.seen: list[float] = []

        def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
            loss = self.layer(batch).square().mean()
            self.seen.append(float(loss))
            self.log("loss", loss)
            return loss

        def train_dataloader(self) -> Any:
            data = torch.arange(32, dtype=torch.float32).reshape(8, 4) / 32
            return torch.utils.data.DataLoader(data, batch_size=2)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    return Module()


def trainer(lightning: Any, folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lightning.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )


def fit(trainer: Any, model: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, **options)


def keeping(lightning: Any, folder: str, **options: Any) -> Any:
    return lightning.callbacks.ModelCheckpoint(
        dirpath=folder, filename="{epoch}", save_last=True, **options
    )


@pytest.mark.parametrize(
    ("place", "last"),
    [*((name, False) for name in ("local", *STORES)), ("local", True), ("s3", True)],
    indirect=["place"],
)
def test_training_goes_on_from_a_store(lightning, place, tmp_path: Path, last: bool) -> None:
    folder = place.put("run/notes.txt", b"x").rpartition("/")[0]
    plugin = checkpoint_io()

    whole = module(lightning)
    fit(trainer(lightning, tmp_path, max_epochs=4, enable_checkpointing=False), whole)

    first = module(lightning)
    fit(
        trainer(
            lightning,
            tmp_path,
            max_epochs=2,
            plugins=[plugin],
            callbacks=[keeping(lightning, folder, save_top_k=1)],
        ),
        first,
    )
    names = sorted(each.uri.filename for each in list_objects(folder))
    assert names == ["epoch=1.ckpt", "last.ckpt", "notes.txt"]  # that of epoch 0 is removed

    second = module(lightning)
    going_on = trainer(
        lightning,
        tmp_path,
        max_epochs=4,
        plugins=[plugin],
        callbacks=[keeping(lightning, folder, save_top_k=1)],
    )
    fit(going_on, second, ckpt_path="last" if last else str(latest(folder)))
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.layer.weight, whole.layer.weight)
    going_on.save_checkpoint(f"{folder}/by hand.ckpt")
    assert load(f"{folder}/by hand.ckpt")["global_step"] == 16
    for entry in list_objects(folder):
        place.put(f"run/{entry.uri.filename}", b"")  # which the fixture removes


SCRIPT = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import lightning.pytorch as lightning
import torch
from anemoi_ckpt import checkpoint_io, latest
from test_lightning import fit, keeping, module, trainer

folder, home = sys.argv[1], Path(sys.argv[2])
for epochs in (1, 2):
    model = module(lightning)
    plugin = checkpoint_io()
    options = {"strategy": "ddp", "devices": 2, "max_epochs": epochs, "plugins": [plugin]}
    training = trainer(lightning, home, callbacks=[keeping(lightning, folder)], **options)
    fit(training, model, ckpt_path=str(latest(folder)) if epochs == 2 else None)
    training.strategy.barrier()
    (home / f"{epochs}-{training.global_rank}.txt").write_text(str(training.global_step))
    torch.save(model.state_dict(), home / f"{epochs}-{training.global_rank}.pt")
"""


def test_two_ranks_resume_from_a_store(s3: servers.Store, tmp_path: Path) -> None:
    needs.package("lightning.pytorch", "pip install lightning")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    folder = s3.uri("ranks")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, folder, tmp_path],
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps = {path.name: path.read_text() for path in tmp_path.glob("*-?.txt")}
    assert steps == {"1-0.txt": "2", "1-1.txt": "2", "2-0.txt": "4", "2-1.txt": "4"}
    first, second = (torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["layer.weight"], second["layer.weight"])
    saved = load(latest(folder))["state_dict"]
    assert torch.equal(saved["layer.weight"], first["layer.weight"])
    for entry in list_objects(folder):
        s3.remove(entry.uri.key)


def test_what_a_plugin_reads_goes_through_its_strategies(tmp_path: Path) -> None:
    needs.package("lightning.pytorch", "pip install lightning")
    plugin = checkpoint_io(drop_optimizer, retries=0)
    path = tmp_path / "new" / "a.ckpt"
    plugin.save_checkpoint({"state_dict": {"w": torch.ones(2)}, "optimizer_states": [1]}, path)
    assert plugin.load_checkpoint(path, map_location="cpu", weights_only=False).keys() == {
        "state_dict"
    }
    plugin.remove_checkpoint(path)
    plugin.remove_checkpoint(path)
    plugin.teardown()
    with pytest.raises(CheckpointNotFoundError):
        plugin.load_checkpoint(path)
    with pytest.raises(TypeError, match="clinet"):
        plugin.save_checkpoint({}, "s3://b/a.ckpt", storage_options={"clinet": 1})


def test_what_is_asked_for_wrongly_is_told_at_once() -> None:
    with pytest.raises(TypeError, match="trusted"):
        checkpoint_io(trusted=True)
    with pytest.raises(TypeError, match="drop_optimizer"):
        checkpoint_io("drop_optimizer")
    with pytest.raises(TypeError, match="map_location"):
        checkpoint_io(map_location="cpu")


def test_lightning_is_not_installed(monkeypatch) -> None:
    def import_module(name: str) -> Any:
        raise ImportError(name)

    with monkeypatch.context() as patched:
        patched.setattr(_anemoi_ckpt.trainers.lightning.importlib, "import_module", import_module)
        with pytest.raises(MissingPackageError, match="pip install lightning"):
            checkpoint_io()


# ── what fsspec is asked ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def fsspec() -> Iterator[Any]:
    needs.package("lightning.pytorch", "pip install lightning")
    module = needs.package("fsspec", "pip install fsspec")
    known = needs.package("fsspec.registry", "pip install fsspec")._registry
    before = dict(known)
    yield module
    known.clear()
    known.update(before)


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_fsspec_finds_what_is_in_a_store(place, fsspec) -> None:
    checkpoint_io(retries=0)
    uri = place.put("run/a.txt", b"hello")
    place.put("run/a.txt.old", b"")
    place.put("run/deep/b.txt", b"")
    folder = uri.rpartition("/")[0]
    files, _ = fsspec.core.url_to_fs(uri)
    assert files.info(uri)["size"] == 5
    assert files.exists(uri)
    assert files.isfile(uri)
    assert files.isdir(folder)
    assert files.isdir(f"{folder}/")
    assert not files.exists(f"{folder}/a.tx")
    names = files.ls(folder, detail=False)
    assert names == [
        f"places::{n.replace('://', ':/')}" for n in (uri, f"{uri}.old", f"{folder}/deep")
    ]
    chained = fsspec.core.url_to_fs(os.path.normpath(names[0]))[0]  # as Lightning does for "last"
    assert type(chained) is type(files)
    assert chained.info(names[0]) == files.info(uri)
    assert files.ls(uri, detail=False) == chained.ls(names[0], detail=False) == names[:1]
    assert files.ls(folder)[2]["type"] == "directory"
    assert files.modified(uri) == list_objects(folder)[0].modified
    with pytest.raises(FileNotFoundError, match="never"):
        files.ls(f"{folder}/never")
    bucket = "/".join(uri.split("/")[:3])
    assert files.isdir(bucket)
    with files.open(uri, "rb") as stream:
        stream.seek(1)
        assert stream.read() == b"ello"
    for mode in ("wb", "ab", "xb", "r+b"):
        with pytest.raises(ValueError, match="can only be read here"):
            files.open(uri, mode)
    files.rm(uri)
    assert not files.exists(uri)
    place.put("run/a.txt", b"hello")
    if place.server:
        place.server.faults.append(servers.Fault(status=503, headers={"Retry-After": "0"}))
        with pytest.raises(UnreachableError):  # no answer is no answer, not "no such file"
            files.exists(uri)


def test_packages_of_fsspec_are_left_alone(fsspec) -> None:
    class Other(fsspec.AbstractFileSystem):
        protocol = "s3"

    fsspec.register_implementation("s3", Other, clobber=True)
    checkpoint_io()
    assert fsspec.get_filesystem_class("s3") is Other
    assert fsspec.get_filesystem_class("az").__name__ == "PlacesFileSystem"


def test_a_path_that_does_not_tell_its_store_is_refused(
    tmp_path: Path, fsspec, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"mine")
    checkpoint_io()
    files = fsspec.get_filesystem_class("s3")()
    for call in (files.info, files.ls, files.rm_file, files.exists, files.open):
        with pytest.raises(ValueError, match=r"write the scheme, as s3://a\.txt"):
            call("a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"mine"
    assert files._strip_protocol(["s3://b/a/", "s3://b"]) == ["s3://b/a", "s3://b"]
    assert type(checkpoint_io()).__module__ == "anemoi_ckpt"


def test_a_checkpoint_is_loaded_by_lightning_itself(s3: servers.Store, lightning) -> None:
    model = module(lightning)
    state = copy.deepcopy(model.state_dict())
    checkpoint = {"pytorch-lightning_version": "2.0.0", "state_dict": state}
    plugin = checkpoint_io()
    plugin.save_checkpoint(checkpoint, s3.uri("by itself.ckpt"))
    torch.nn.init.zeros_(model.layer.weight)
    loaded = type(model).load_from_checkpoint(s3.uri("by itself.ckpt"))
    assert torch.equal(loaded.layer.weight, checkpoint["state_dict"]["layer.weight"])
    plugin.remove_checkpoint(s3.uri("by itself.ckpt"))


def test_a_hook_gets_real_objects_of_the_classes_that_are_trusted(
    lightning: Any, s3: servers.Store, tmp_path: Path
) -> None:
    omegaconf = needs.package("omegaconf", "pip install omegaconf")
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    class Configured(type(module(lightning))):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            settings = {"lr": 0.1, "twice": ["${lr}"], "absent": "${nowhere}"}
            checkpoint["settings"] = omegaconf.OmegaConf.create(settings)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.config = checkpoint["settings"]

    classes = omegaconf.DictConfig, omegaconf.ListConfig, ContainerMetadata, Metadata, AnyNode, Any
    plugin = checkpoint_io(trust=classes)
    first = trainer(lightning, tmp_path, max_epochs=1, plugins=[plugin])
    fit(first, Configured())
    first.save_checkpoint(s3.uri("trusting/last.ckpt"))
    resumed = Configured()
    second = trainer(lightning, tmp_path, max_epochs=2, plugins=[plugin])
    fit(second, resumed, ckpt_path=s3.uri("trusting/last.ckpt"))
    assert type(resumed.config) is omegaconf.DictConfig
    assert omegaconf.OmegaConf.select(resumed.config, "twice[0]") == 0.1
    s3.remove("trusting/last.ckpt")
