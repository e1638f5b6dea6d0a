"""anemoi-training itself resumes from S3 and begins with weights from there: `nox -s anemoi`.

It wants another torch than most tests, so this file is skipped where it is not installed.
"""

import asyncio
import io
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import servers
from checkpoints import assert_same

ROOT = Path(__file__).parents[1]
PROGRAM = Path(sys.executable).with_name("anemoi-training")

if not PROGRAM.exists():
    pytest.skip("anemoi-training is not installed here", allow_module_level=True)

VARIABLES = {
    "a": ["t_850", "z_500", "q_700", "msl", "cos_latitude", "lsm", "tp"],
    "b": ["cos_latitude", "lsm", "msl", "t_925", "t_850", "tp", "z_500", "cp"],
}
DIAGNOSTIC = {"a": ["tp"], "b": ["tp", "cp"]}
FORCING = ["cos_latitude", "lsm"]

SETTINGS = [
    "config_validation=True",
    "model=gnn",
    "graph.nodes.hidden.node_builder.resolution=1",
    "model.num_channels=16",
    "model.processor.num_layers=1",
    "model.processor.num_chunks=1",
    "training.precision='32-true'",
    "training.num_sanity_val_steps=0",
    "training.optimization.lr_scheduler.warmup_t=2",
    "training.metrics.datasets.data=[z_500]",
    "data.datasets.data.processors.normalizer.config.std=[tp]",
    "data.datasets.data.processors.normalizer.config.max=[]",
    "data.datasets.data.processors.normalizer.config.none=[cos_latitude,lsm]",
    "dataloader.num_workers.training=1",
    "dataloader.num_workers.validation=1",
    "dataloader.persistent_workers=False",
    "dataloader.pin_memory=False",
    "dataloader.batch_size.training=2",
    "dataloader.batch_size.validation=2",
    "dataloader.limit_batches.training=4",
    "dataloader.limit_batches.validation=2",
    "dataloader.training.datasets.data.end=2020-01-04",
    "dataloader.validation.datasets.data.start=2020-01-05",
    "dataloader.validation.datasets.data.end=2020-01-06",
    "dataloader.test.datasets.data.start=2020-01-05",
    "dataloader.test.datasets.data.end=null",
    "diagnostics.plot.callbacks=[]",
    "diagnostics.log.mlflow.tracking_uri=null",
    "diagnostics.enable_progress_bar=False",
    "diagnostics.checkpoint.every_n_epochs.num_models_saved=1",
    "system.hardware.accelerator=cpu",
    "system.input.graph=null",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
]


def mars(name: str) -> dict[str, Any]:
    """How MARS names a variable: `t_850` is on a level of pressure."""
    parameter, _, level = name.partition("_")
    if level.isdigit():
        return {"param": parameter, "levtype": "pl", "levelist": int(level)}
    return {"param": parameter, "levtype": "sfc"}


def dataset(path: Path, names: list[str]) -> Path:
    """Six days of smooth noise on 48 points, as anemoi-datasets stores them."""
    np = pytest.importorskip("numpy")
    zarr = pytest.importorskip("zarr")
    latitudes, longitudes = (
        part.ravel()
        for part in np.meshgrid(np.linspace(75, -75, 6), np.arange(0, 360, 45), indexing="ij")
    )
    dates = np.datetime64("2020-01-01T00:00:00", "s") + np.arange(24) * np.timedelta64(6, "h")
    data = np.zeros((24, len(names), 1, 48), np.float32)
    for index, name in enumerate(names):
        noise = np.random.default_rng(zlib.crc32(name.encode()))
        fixed = noise.normal(size=48)
        moving = np.sin(np.deg2rad(longitudes) + 0.3 * np.arange(24)[:, None])
        data[:, index, 0] = fixed if name in FORCING else abs(fixed + noise.normal() * moving)
    root = zarr.open(str(path), mode="w")
    arrays = {"data": data, "dates": dates, "latitudes": latitudes, "longitudes": longitudes}
    for beginning, values in (("", data), ("statistics_tendencies_6h_", np.diff(data, axis=0))):
        flat = values[:, :, 0].swapaxes(0, 1).reshape(len(names), -1).astype(np.float64)
        arrays |= {
            f"{beginning}mean": flat.mean(1),
            f"{beginning}stdev": flat.std(1) + 1e-9,
            f"{beginning}minimum": flat.min(1),
            f"{beginning}maximum": flat.max(1),
        }
    for name, values in arrays.items():
        root.create_dataset(name, data=values, compressor=None)
    described = {
        name: {
            "mars": mars(name),
            "units": "1",
            **({"constant_in_time": True} if name in FORCING else {}),
        }
        for name in names
    }
    root.attrs.update(
        frequency="6h",
        resolution="o1",
        variables=names,
        name_to_index={name: index for index, name in enumerate(names)},
        data_request={"grid": 1, "area": "g", "param_level": {}},
        variables_metadata=described,
        field_shape=[48],
        flatten_grid=True,
        ensemble_dimension=1,
        constant_fields=FORCING,
        version="0.30",
        missing_dates=[],
        start_date=str(dates[0]),
        end_date=str(dates[-1]),
    )
    return path


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {key: dataset(folder / f"{key}.zarr", names) for key, names in VARIABLES.items()}


def train(
    data: Path, folder: Path, steps: int, *overrides: str, checkpoint: str = "", seed: int = 1
) -> tuple[Path, str]:
    """A real run; gives its last checkpoint, and what it said."""
    folder.mkdir(parents=True)
    command = [PROGRAM, "train", "--config-dir", ROOT / "examples/anemoi_training", *overrides]
    command += [
        *SETTINGS,
        *(f"training.max_steps={steps}", f"training.max_epochs={steps // 4}"),
        *(f"system.input.dataset={data}", f"system.output.root={folder}"),
        f"data.datasets.data.forcing=[{','.join(FORCING)}]",
        f"data.datasets.data.diagnostic=[{','.join(DIAGNOSTIC[data.stem])}]",
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "ANEMOI_BASE_SEED": str(seed), "CHECKPOINT": checkpoint},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (last,) = folder.rglob("last.ckpt")
    return last, done.stdout + done.stderr


def read(path: Path) -> Any:
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def first(datasets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of eight steps."""
    path, _ = train(datasets["a"], tmp_path_factory.mktemp("runs") / "first", 8, *NOTHING)
    return path


NOTHING = ["diagnostics.callbacks=[]"]


@pytest.mark.timeout(600)
def test_a_run_resumes_from_s3_as_from_a_file(
    datasets, first: Path, s3: servers.Store, tmp_path: Path
) -> None:
    local = [*NOTHING, f"system.input.warm_start={first}"]
    expected = read(train(datasets["a"], tmp_path / "local", 12, *local)[0])
    s3.write("run/epoch=1.ckpt", first.read_bytes())
    remote = [*NOTHING, "+checkpoint=resume"]
    folder = f"{s3.uri('run')}/"
    path, _ = train(datasets["a"], tmp_path / "remote", 12, *remote, checkpoint=folder)
    resumed = read(path)
    assert resumed["global_step"] == expected["global_step"] == 12
    assert_same(dict(resumed["state_dict"]), dict(expected["state_dict"]))
    assert_same(resumed["optimizer_states"], expected["optimizer_states"])
    s3.remove("run/epoch=1.ckpt")


@pytest.mark.timeout(600)
def test_a_run_begins_with_weights_from_s3(
    datasets, first: Path, s3: servers.Store, tmp_path: Path
) -> None:
    s3.write("pretrained.ckpt", first.read_bytes())
    options = ["+checkpoint=transfer", "training.optimization.lr=0.0"]  # all but stays as loaded
    uri = s3.uri("pretrained.ckpt")
    path, said = train(datasets["b"], tmp_path / "b", 4, *options, checkpoint=uri, seed=2)
    fresh, _ = train(datasets["b"], tmp_path / "fresh", 4, *NOTHING, options[1], seed=2)
    assert "aligned" in said
    trained, pretrained, begun = (read(each)["state_dict"] for each in (path, first, fresh))
    kept = [name for name in trained if ".processor." in name and name.endswith("mlp.0.weight")]
    assert kept
    for name in kept:
        assert torch.allclose(trained[name], pretrained[name], rtol=0, atol=1e-4)
        assert not torch.allclose(begun[name], pretrained[name], rtol=0, atol=1e-2)
    s3.remove("pretrained.ckpt")


# ── its pipeline of checkpoints ───────────────────────────────────────────────────────────────


def stages_of(uri: str) -> dict[str, list[dict[str, Any]]]:
    recipe = {"_target_": "anemoi_ckpt.strategies.standard", "_partial_": True}
    loader = "anemoi.training.checkpoint.loading.WeightsOnlyLoader"
    return {
        "a source before a loader of Anemoi's": [
            {"_target_": "anemoi_ckpt.source_stage", "uri": uri},
            {"_target_": loader, "strict": True},
        ],
        "a loader alone": [{"_target_": "anemoi_ckpt.loading_stage", "uri": uri, "recipe": recipe}],
    }


@pytest.mark.parametrize("kind", stages_of(""))
def test_stages_stand_in_its_pipeline(kind: str, s3: servers.Store) -> None:
    checkpoint = pytest.importorskip("anemoi.training.checkpoint")
    stored, model = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    torch.save({"state_dict": stored.state_dict()}, held := io.BytesIO())
    s3.write("staged.ckpt", held.getvalue())
    pipeline = checkpoint.CheckpointPipeline(stages=stages_of(s3.uri("staged.ckpt"))[kind])
    context = asyncio.run(pipeline.execute(checkpoint.CheckpointContext(model=model)))
    assert_same(dict(context.model.state_dict()), dict(stored.state_dict()))
    assert context.model.weights_initialized is True
    s3.remove("staged.ckpt")
