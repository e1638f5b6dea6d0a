"""Places that say where a file really is: Hugging Face's hub, and MLflow; and files in shards."""

import importlib
import json
import os
import sys
import traceback
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import _anemoi_ckpt.places
import _anemoi_ckpt.transport
import needs
import servers
import strategies
from _anemoi_ckpt.places import sibling
from anemoi_ckpt import (
    GCSURI,
    HFURI,
    HTTPURI,
    S3URI,
    URI,
    AccessDeniedError,
    AzureURI,
    Buffers,
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptError,
    InvalidURIError,
    LocalURI,
    MismatchError,
    MissingPackageError,
    NotACheckpointError,
    UnreachableError,
    download,
    find,
    latest,
    list_objects,
    load,
    load_into,
    main,
    open_stream,
    parse_uri,
    peek,
    read_range,
    register_scheme,
    resolve,
    save,
)
from checkpoints import as_bytes, assert_same
from hub import Hub, running_hub, running_mlflow
from pages import marked
from strategies import include, weights

# ── Hugging Face ──────────────────────────────────────────────────────────────────────────────

REPO = "ecmwf/aifs-single"
CHECKPOINT = {
    "state_dict": {f"layer.{n}": torch.full((50_000,), float(n)) for n in range(8)},
    "optimizer_states": [torch.zeros(800_000)],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    with running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", f"{running.url}/")
        yield running


@pytest.mark.parametrize(
    ("text", "repo", "revision", "path"),
    [
        ("hf://a/b/c.ckpt", "a/b", "main", "c.ckpt"),
        ("hf://a/b@v1.0/d/c.ckpt", "a/b", "v1.0", "d/c.ckpt"),
        ("hf://a/b@refs/pr/3/c.ckpt", "a/b", "refs/pr/3", "c.ckpt"),
        ("hf://a/b@my%2Fbranch/c d.ckpt", "a/b", "my/branch", "c d.ckpt"),
        ("hf://datasets/a/b/c.ckpt", "datasets/a/b", "main", "c.ckpt"),
        ("hf://a/b/c@d.ckpt", "a/b", "main", "c@d.ckpt"),
        ("HF://A/b/c.ckpt", "A/b", "main", "c.ckpt"),
        ("hf://models/a/b@v1/c.ckpt", "a/b", "v1", "c.ckpt"),
        ("hf://buckets/a/b/c@d/e.ckpt", "buckets/a/b", "", "c@d/e.ckpt"),
        ("hf://a/b", "a/b", "main", ""),
        ("hf://a/b@v1/run/", "a/b", "v1", "run/"),
    ],
)
def test_a_text_names_a_file_of_a_repository(text, repo, revision, path) -> None:
    assert parse_uri(text) == HFURI(text, repo, path, revision)
    assert parse_uri(text).filename == path.rstrip("/").rpartition("/")[2]
    assert CheckpointNotFoundError(text, "", "").place == text  # a revision is no password


@pytest.mark.parametrize(
    "text", ["hf://", "hf://a", "hf://datasets/a", "hf://buckets/a", "hf://buckets/a/b@v1/c"]
)
def test_a_text_that_names_no_file_of_a_repository(text: str) -> None:
    with pytest.raises(InvalidURIError, match="write hf://owner/repo"):
        parse_uri(text)


def test_where_the_hub_is_and_how_a_revision_is_written(monkeypatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    place = parse_uri("hf://a/b@refs/pr/3/c d.ckpt")
    assert place.url == "https://huggingface.co/a/b/resolve/refs%2Fpr%2F3/c%20d.ckpt"


def test_only_what_is_needed_moves_from_the_hub(hub: Hub) -> None:
    hub.commit(REPO, {"run/last.ckpt": as_bytes(CHECKPOINT)})
    assert_same(load(f"hf://{REPO}/run/last.ckpt"), CHECKPOINT)
    hub.cdn.reset()
    assert_same(load(f"hf://{REPO}/run/last.ckpt", weights), CHECKPOINT["state_dict"])
    assert hub.cdn.bytes_sent < 1.02 * 1_600_000 + 2**20
    assert {request.method for request in hub.cdn.log} == {"GET"}
    assert peek(f"hf://{REPO}/run/last.ckpt").keys["state_dict"] == 1_600_000


def test_all_reads_are_of_one_commit(hub: Hub) -> None:
    """A branch that moves on meanwhile is no matter: its commit is asked for once."""
    first = hub.commit(REPO, {"a.ckpt": as_bytes(CHECKPOINT)})
    hub.fault = lambda request: move_on(hub, request)
    assert_same(load(f"hf://{REPO}/a.ckpt"), CHECKPOINT)
    asked = [request for request in hub.log if request.method == "GET"]
    assert asked
    assert all(f"/resolve/{first}/" in request.path for request in asked)
    hub.fault = None
    assert load(f"hf://{REPO}/a.ckpt") == {"moved": "on"}
    assert_same(load(f"hf://{REPO}@{first}/a.ckpt"), CHECKPOINT)


def move_on(hub: Hub, request: servers.Request) -> None:
    if request.method == "GET" and hub.branches[REPO, "main"]:
        hub.commit(REPO, {"a.ckpt": as_bytes({"moved": "on"})})


def test_a_server_that_tells_no_commit_is_read_by_branch(hub: Hub) -> None:
    hub.commit(REPO, {"a.ckpt": as_bytes(CHECKPOINT)})
    hub.fault = lambda request: servers.Fault(headers={"X-Repo-Commit": None})
    assert_same(load(f"hf://{REPO}/a.ckpt"), CHECKPOINT)
    assert all("/resolve/main/" in request.path for request in hub.log)


def test_the_token_goes_to_the_hub_alone(hub: Hub, monkeypatch, tmp_path: Path) -> None:
    hub.commit(REPO, {"a.ckpt": as_bytes(CHECKPOINT)})
    hub.private[REPO] = "hf_5ec4e7"
    with pytest.raises(AccessDeniedError, match="set HF_TOKEN") as caught:
        load(f"hf://{REPO}/a.ckpt")
    assert caught.value.place == f"hf://{REPO}/a.ckpt"
    assert "(the server answered 401 Unauthorized: Repository not found)" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_5ec4e7")
    assert_same(load(f"hf://{REPO}/a.ckpt"), CHECKPOINT)
    assert_same(load(download(f"hf://{REPO}/a.ckpt", tmp_path / "a.ckpt")), CHECKPOINT)
    assert hub.cdn.log
    assert not any(request.headers["Authorization"] for request in hub.cdn.log)


def test_where_the_token_is_found(hub: Hub, monkeypatch, tmp_path: Path) -> None:
    def token() -> str | None:
        return parse_uri(f"hf://{REPO}/a.ckpt").headers.get("Authorization")

    assert token() is None
    file = Path.home() / ".cache/huggingface/token"
    file.parent.mkdir(parents=True)
    file.write_text("of-login\n")
    assert token() == "Bearer of-login"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert token() is None
    monkeypatch.setenv("HF_HOME", str(file.parent))
    assert token() == "Bearer of-login"
    (tmp_path / "other").write_text("of-other")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "other"))
    assert token() == "Bearer of-other"
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "of-old-name")
    assert token() == "Bearer of-old-name"
    monkeypatch.setenv("HF_TOKEN", "of-environment")
    assert token() == "Bearer of-environment"
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert token() is None
    given = {"headers": {"authorization": "Bearer hf_5ec4e7"}}
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    hub.private[REPO] = "hf_5ec4e7"
    hub.commit(REPO, {"a.ckpt": as_bytes({"a": 1})})
    assert load(f"hf://{REPO}/a.ckpt", transport_params=given) == {"a": 1}


def test_what_a_beginner_meets_at_the_hub(hub: Hub) -> None:
    hub.commit(REPO, {"a.ckpt": as_bytes(CHECKPOINT)})
    with pytest.raises(CheckpointNotFoundError) as caught:
        load(f"hf://{REPO}/b.ckpt")
    assert caught.value.place == f"hf://{REPO}/b.ckpt"
    with pytest.raises(InvalidURIError, match="cannot be written to"):
        save({}, f"hf://{REPO}/b.ckpt")
    hub.faults.append(servers.Fault(status=503))
    assert_same(load(f"hf://{REPO}/a.ckpt"), CHECKPOINT)
    hub.stop()
    with pytest.raises(UnreachableError):
        load(f"hf://{REPO}/a.ckpt", retries=0)


def test_a_download_is_checked_against_the_hubs_digest(hub: Hub, tmp_path: Path) -> None:
    hub.commit(REPO, {"a.safetensors": safetensors.torch.save({"w": torch.arange(9.0)})})
    hub.cdn.fault = lambda request: servers.Fault(flip=-8)
    with pytest.raises(CorruptError, match="sha256"):
        download(f"hf://{REPO}/a.safetensors", tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_name_tells_those_that_the_hub_has(hub: Hub) -> None:
    commit = hub.commit(REPO, {"run/last.ckpt": b"x", "run/other.txt": b"x"})
    for name, said in {
        "run/lasst.ckpt": r"Entry not found\); is it one of these: last.ckpt\?$",
        "runn": r"is it one of these: run/\?$",
        "run/xyz": "check the name for typing errors$",
    }.items():
        for text in (f"{REPO}/{name}", f"{REPO}@{commit}/{name}"):
            for act in (load, peek, download):
                with pytest.raises(CheckpointNotFoundError, match=said):
                    act(f"hf://{text}")


def test_a_file_that_changes_without_a_commit(hub: Hub) -> None:
    hub.commit(REPO, {"a.ckpt": as_bytes(CHECKPOINT)})
    hub.cdn.fault = lambda request: servers.Fault(headers={"ETag": f'"{id(request)}"'})
    with pytest.raises(ChangedError):
        load(f"hf://{REPO}/a.ckpt")


def test_a_repository_that_was_renamed(hub: Hub) -> None:
    commit = hub.commit("new/name", {"a.ckpt": as_bytes(CHECKPOINT), "run/b.ckpt": b"x"})
    hub.renamed["old/name"] = "new/name"
    found = resolve(parse_uri("hf://old/name/a.ckpt"))
    assert (found.repo, found.revision, str(found)) == ("new/name", commit, "hf://old/name/a.ckpt")
    assert_same(load("hf://old/name/a.ckpt"), CHECKPOINT)
    assert_same(load("hf://old/name"), CHECKPOINT)
    assert [str(each.uri) for each in list_objects("hf://old/name/run")] == [
        "hf://old/name/run/b.ckpt"
    ]
    hub.renamed |= {"a/1": "a/2", "a/2": "a/1"}
    with pytest.raises(CheckpointError, match="answered 307"):
        load("hf://a/1/a.ckpt", retries=0)


def test_a_file_in_a_bucket(hub: Hub, tmp_path: Path) -> None:
    bucket = "buckets/owner/weather"
    hub.put(bucket, {"run/a.ckpt": as_bytes(CHECKPOINT), "run/b.txt": b"x"})
    assert_same(load(f"hf://{bucket}/run/a.ckpt"), CHECKPOINT)
    assert_same(load(f"hf://{bucket}/run/a.ckpt", cached=True), CHECKPOINT)
    assert_same(load(f"hf://{bucket}/run"), CHECKPOINT)
    assert_same(load(download(f"hf://{bucket}/run/a.ckpt", tmp_path)), CHECKPOINT)
    assert [str(each.uri) for each in list_objects(f"hf://{bucket}")] == [f"hf://{bucket}/run/"]
    assert latest(f"hf://{bucket}/run").filename == "a.ckpt"
    (entry,) = find(f"hf://{bucket}/**/a*")
    assert (entry.size, entry.modified.day) == (len(as_bytes(CHECKPOINT)), 10)


def test_a_repository_with_one_checkpoint_is_that(hub: Hub) -> None:
    data = as_bytes(CHECKPOINT)
    commit = hub.commit(REPO, {"aifs-single_v1.ckpt": data, "README.md": b"x", "v1.0/w.bin": data})
    for text in (REPO, f"{REPO}/", f"{REPO}@{commit}", f"{REPO}/v1.0", f"{REPO}@{commit}/v1.0"):
        assert_same(load(f"hf://{text}", weights), CHECKPOINT["state_dict"])
        found = resolve(parse_uri(f"hf://{text}"))
        assert (found.revision, str(found)) == (commit, f"hf://{text}")
    assert peek(f"hf://{REPO}/v1.0").place == f"hf://{REPO}/v1.0"
    for name, files in {
        "several checkpoints.*a.ckpt, b.pt": {"a.ckpt": data, "b.pt": data, "c/d.ckpt": data},
        "no checkpoint in this folder; in it: README.md": {"README.md": b"x"},
    }.items():
        hub.commit(REPO, files)
        with pytest.raises((InvalidURIError, CheckpointNotFoundError), match=name):
            load(f"hf://{REPO}")
    with pytest.raises(CheckpointNotFoundError, match="Entry not found"):
        load(f"hf://{REPO}/none")
    hub.commit(REPO, shards())
    hub.page = 3
    assert_same(
        load(f"hf://{REPO}", include("layer.5")), {"layer.5.weight": WHOLE["layer.5.weight"]}
    )


def test_what_is_in_a_repository(hub: Hub) -> None:
    data = as_bytes({"a": 1})
    hub.commit(REPO, {f"run/{name}.ckpt": data for name in "abcde"} | {"run/deep/f.ckpt": data})
    hub.page = 2
    hub.private[REPO] = "hf_5ec4e7"
    with pytest.raises(AccessDeniedError, match="Repository not found"):
        list_objects(f"hf://{REPO}")
    headers = {"headers": {"Authorization": "Bearer hf_5ec4e7"}}
    entries = list_objects(f"hf://{REPO}/run", transport_params=headers)
    names = [str(each.uri).removeprefix(f"hf://{REPO}/run/") for each in entries]
    assert names == ["a.ckpt", "b.ckpt", "c.ckpt", "d.ckpt", "deep/", "e.ckpt"]
    assert latest(f"hf://{REPO}/run", transport_params=headers).filename == "e.ckpt"
    found = find(f"hf://{REPO}/**/[f-z]*", transport_params=headers)
    assert [str(each.uri) for each in found] == [f"hf://{REPO}/run/deep/f.ckpt"]
    assert load(found[0], transport_params=headers) == {"a": 1}
    with pytest.raises(CheckpointNotFoundError, match="does not exist on that revision"):
        list_objects(f"hf://{REPO}/none", transport_params=headers)


# ── shards ────────────────────────────────────────────────────────────────────────────────────

WHOLE = {f"layer.{n}.weight": torch.arange(n, n + 100_000.0) for n in range(6)}


def shards(suffix: str = "safetensors") -> dict[str, bytes]:
    """Three files of two tensors each, and the index, as huggingface_hub writes them."""
    write = safetensors.torch.save if suffix == "safetensors" else as_bytes
    names = [f"model-{n:05}-of-00003.{suffix}" for n in (1, 2, 3)]
    weight_map = {name: names[n // 2] for n, name in enumerate(WHOLE)}
    files = {
        each: write({name: WHOLE[name] for name in WHOLE if weight_map[name] == each})
        for each in names
    }
    index = {"metadata": {"total_size": 2_400_000}, "weight_map": weight_map}
    return {f"model.{suffix}.index.json": json.dumps(index, indent=2).encode(), **files}


def stored(suffix: str = "safetensors") -> int:
    _, *files = shards(suffix).values()
    return sum(map(len, files))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_load_as_one(place, suffix: str) -> None:
    uris = [place.put(name, data) for name, data in shards(suffix).items()]
    if place.server:
        place.server.reset()
    assert_same(load(uris[0], include("layer.3")), {"layer.3.weight": WHOLE["layer.3.weight"]})
    if place.server:
        assert place.server.bytes_sent < 1.02 * 400_000 + 2**20
    assert_same(load(uris[0]), WHOLE)
    assert_same(load(uris[0], cached=True), WHOLE)
    assert_same(load(uris[0], cached=True), WHOLE)
    contents = peek(uris[0])
    assert contents.format.endswith(", 3 shards")
    assert contents.bytes == stored(suffix)
    assert [tensor.name for tensor in contents.tensors] == list(WHOLE)


def test_shards_go_into_a_model_and_the_report_says_what_moved(http_server) -> None:
    uris = [http_server.put(f"dir/{name}", data) for name, data in shards().items()]
    model = torch.nn.Module()
    model.layer = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    for each in model.layer:
        each.weight = torch.nn.Parameter(torch.zeros(100_000))
    report = load_into(model, f"{uris[0]}?token=1")
    assert {request.query for request in http_server.log} == {"token=1"}
    assert report.loaded == ("layer.0.weight", "layer.1.weight")
    assert 800_000 < report.bytes_moved < 1.02 * 800_000 + 2**20
    assert report.bytes_stored == stored()
    assert torch.equal(model.layer[1].weight, WHOLE["layer.1.weight"])


def test_shards_at_the_hub_are_of_one_commit_and_moved_by_range(hub: Hub) -> None:
    """The hub gives the index whole: it is no large file."""
    hub.commit(REPO, {f"v2/{name}": data for name, data in shards().items()})
    uri = f"hf://{REPO}/v2/model.safetensors.index.json"
    assert_same(load(uri, include("layer.5")), {"layer.5.weight": WHOLE["layer.5.weight"]})
    assert hub.cdn.bytes_sent < 1.02 * 400_000 + 2**20
    commit = hub.branches[REPO, "main"]
    assert {r.path.split("/")[4] for r in hub.log if r.method == "GET"} == {commit}


def test_shards_of_a_server_without_ranges(http_server: servers.HTTPServer) -> None:
    uris = [http_server.put(name, data) for name, data in shards().items()]
    http_server.fault = lambda request: servers.Fault(ignore_range=True)
    assert_same(load(uris[0]), WHOLE)
    asked = []

    def by_and_by(request: servers.Request) -> servers.Fault | None:
        asked.append(request)
        return servers.Fault(ignore_range=len(asked) > 5 and "of" in request.path)

    http_server.fault = by_and_by
    with pytest.raises(UnreachableError, match="gave one range of it, and then refused another"):
        load(uris[0], retries=1)


def test_shards_that_are_damaged_in_the_cache_are_fetched_anew(http_server) -> None:
    uris = [http_server.put(name, data) for name, data in shards("bin").items()]
    assert_same(load(uris[0], cached=True), WHOLE)
    for path in Path(os.environ["ANEMOI_CKPT_CACHE"]).glob("*/model-*.bin"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert_same(load(uris[0], cached=True), WHOLE)


def test_a_record_of_a_shard_that_is_wrong_is_named(tmp_path: Path) -> None:
    for name, data in shards("bin").items():
        wrong = bytearray(data)
        if "2-of" in name:
            wrong[len(data) // 2] ^= 1
        (tmp_path / name).write_bytes(wrong)
    with pytest.raises(CorruptError, match=r"of model-00002-of-00003\.bin"):
        load(tmp_path / "model.bin.index.json")


@pytest.mark.parametrize(
    ("index", "error", "said"),
    [
        (b'{"a": 1}', NotACheckpointError, "JSON, and no index of shards"),
        (b'{"weight_map": {}}', NotACheckpointError, "no index of shards"),
        (b'{"weight_map": [1]}', NotACheckpointError, "no index of shards"),
        (b'{"weight_map": ', CorruptError, "its JSON cannot be read"),
        (b'{"weight_map": {"w": 3}}', CorruptError, "3 is no file beside it"),
        (b'{"weight_map": {"w": "../x"}}', CorruptError, "is no file beside it"),
        (b'{"weight_map": {"w": "/etc/passwd"}}', CorruptError, "is no file beside it"),
        (b'{"weight_map": {"w": "s3://b/x"}}', CorruptError, "is no file beside it"),
        (b'{"weight_map": {"w": "none"}}', CheckpointNotFoundError, "none: there is no such file"),
        (b'{"weight_map": {"w": "empty"}}', NotACheckpointError, "the file is empty"),
        (b'{"weight_map": {"w": "index.json"}}', NotACheckpointError, "it begins with"),
        (b'{"weight_map": {"v": "a.bin"}}', CorruptError, "'a.bin' has no 'v'"),
        (b'{"weight_map": {"v": "list.bin"}}', CorruptError, "'list.bin' has no 'v'"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, index: bytes, error, said: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "index.json").write_bytes(index)
    torch.save({"w": torch.ones(2)}, tmp_path / "a.bin")
    torch.save([torch.ones(2)], tmp_path / "list.bin")
    with pytest.raises(error, match=said):
        load(tmp_path / "index.json")


def test_shards_of_old_torch_and_of_another_byte_order(tmp_path: Path) -> None:
    old = {"w": torch.ones(2), "module": torch.nn.Linear(1, 1)}
    torch.save(old, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"v": torch.ones(3)}, tmp_path / "new.bin")
    index, big = tmp_path / "index.json", tmp_path / "big.bin"
    index.write_text(json.dumps({"weight_map": {"w": "old.bin", "v": "new.bin"}}))
    assert_same(load(index), {"w": torch.ones(2), "v": torch.ones(3)})
    with zipfile.ZipFile(tmp_path / "new.bin") as new, zipfile.ZipFile(big, "w") as copy:
        for name in new.namelist():
            copy.writestr(name, b"big" if name.endswith("byteorder") else new.read(name))
    index.write_text(json.dumps({"weight_map": {"w": "old.bin", "v": "big.bin"}}))
    with pytest.raises(CorruptError, match="two byte orders"):
        load(index)


def test_shards_become_one_file(tmp_path: Path, capsys) -> None:
    for name, data in shards().items():
        (tmp_path / name).write_bytes(data)
    index, to = tmp_path / "model.safetensors.index.json", tmp_path / "one.safetensors"
    assert main(["copy", str(index), str(to)]) == 0
    assert_same(load(to), WHOLE)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("dir/a.json", LocalURI("dir/b c", "dir/b c")),
        ("a.json", LocalURI("b c", "b c")),
        ("s3://b/dir/a?b.json?versionId=3", S3URI("s3://b/dir/b c", "b", "dir/b c")),
        ("gs://b/dir/a.json#3", GCSURI("gs://b/dir/b c", "b", "dir/b c")),
        ("az://c/dir/a.json?snapshot=3", AzureURI("az://c/dir/b c", "c", "dir/b c")),
        ("https://h/dir/a.json?x=/1", HTTPURI("https://h/dir/b%20c?x=/1")),
        ("hf://o/r@v/dir/a?.json", HFURI("hf://o/r@v/dir/b c", "o/r", "dir/b c", "v")),
    ],
)
def test_what_stands_beside_a_place(text: str, fields) -> None:
    assert sibling(parse_uri(text), "b c") == fields


# ── MLflow ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def mlflow() -> Any:
    return needs.package("mlflow", "pip install -e '.[test]'")


@pytest.fixture(scope="module")
def mlflow_server(mlflow: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    allowed = {"MLFLOW_ALLOWED_HOST_ADDRESSED_ARTIFACT_SCHEMES": "http"}
    with running_mlflow(
        folder, "--artifacts-destination", str(folder / "artifacts"), **allowed
    ) as url:
        yield url


@pytest.fixture
def tracked(mlflow: Any, mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the server, which readers reach by their environment."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(None)  # Lightning's logger sets it for the whole process
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


def logged(client: Any, folder: Path) -> str:
    """A run with `dir/a b.ckpt`; gives its identifier."""
    (folder / "a b.ckpt").write_bytes(as_bytes(CHECKPOINT))
    run = client.create_run("0").info.run_id
    client.log_artifact(run, str(folder / "a b.ckpt"), "dir")
    return run


def test_a_checkpoint_that_lightning_logged(tracked, mlflow_server: str, tmp_path: Path) -> None:
    import lightning
    from lightning.pytorch.loggers import MLFlowLogger

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(300, 300)

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    logger = MLFlowLogger("weather", tracking_uri=mlflow_server, log_model=True)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        max_epochs=2,
        log_every_n_steps=1,
        logger=logger,
        default_root_dir=tmp_path,
        accelerator="cpu",
        **quiet,
    )
    net = Net()
    trainer.fit(net, torch.utils.data.DataLoader(torch.randn(8, 300), batch_size=4))
    written = Path(trainer.checkpoint_callback.best_model_path)
    uri = f"runs:/{logger.run_id}/{written.stem}/{written.name}"
    assert_same(load(uri), load(written))
    report = load_into(Net(), uri)
    assert report.place == uri
    assert not report.missing
    assert report.bytes_moved < written.stat().st_size / 2
    assert peek(uri).epoch == 1


def test_the_ways_to_name_what_mlflow_keeps(tracked, tmp_path: Path) -> None:
    run = logged(tracked, tmp_path)
    name = f"of-{run}"
    tracked.create_registered_model(name)
    first = tracked.create_model_version(name, f"runs:/{run}/dir", run)
    second = tracked.create_model_version(name, f"models:/{name}/{first.version}", run)
    tracked.set_registered_model_alias(name, "champion", first.version)
    model = tracked.create_logged_model("0", source_run_id=run)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a b.ckpt").write_bytes(as_bytes(CHECKPOINT))
    tracked.log_model_artifacts(model.model_id, str(tmp_path / "model"))
    for text in (
        f"runs:/{run}/dir/a b.ckpt",
        f"models:/{name}/{first.version}/a b.ckpt",
        f"models:/{name}/{second.version}/a b.ckpt",
        f"models:/{name}/champion/a b.ckpt",
        f"models:/{name}/latest/a b.ckpt",
        f"models:/{name}@champion/a b.ckpt",
        f"models:/{model.model_id}/a b.ckpt",
        f"Runs://{run}/dir/a b.ckpt",
        f"mlflow-artifacts:/0/{run}/artifacts/dir/a b.ckpt",
    ):
        assert_same(load(text, weights), CHECKPOINT["state_dict"])
    with open_stream(text) as stream:
        assert stream.read(2) == b"PK"
    buffer = bytearray(2)
    assert read_range(parse_uri(text), -2, Buffers(buffer)).size == len(as_bytes(CHECKPOINT))
    (tmp_path / "got").mkdir()
    assert_same(load(download(text, tmp_path / "got")), CHECKPOINT)
    assert_same(load(text, weights, cached=True), CHECKPOINT["state_dict"])


def test_a_model_that_a_run_has_logged(tracked, tmp_path: Path) -> None:
    """MLflow 3 keeps its files elsewhere than the run's."""
    run = logged(tracked, tmp_path)
    for epoch in (1, 2):
        model = tracked.create_logged_model("0", name="net", source_run_id=run)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data/model.pth").write_bytes(as_bytes({"epoch": epoch}))
        tracked.log_model_artifacts(model.model_id, str(tmp_path))
    other = tracked.create_run("0").info.run_id
    tracked.create_logged_model("0", name="net", source_run_id=other)
    tracked.log_artifact(run, str(tmp_path / "a b.ckpt"), "net/data")
    assert load(f"runs:/{run}/net/data/model.pth") == {"epoch": 2}
    assert_same(load(f"runs:/{run}/net/data/a b.ckpt", weights), CHECKPOINT["state_dict"])
    entries = list_objects(f"runs:/{run}/net/data/")
    assert [str(each.uri) for each in entries] == [
        f"runs:/{run}/net/data/{name}" for name in ("a b.ckpt", "model.pth")
    ]
    with pytest.raises(CheckpointNotFoundError):
        load(f"runs:/{other}/net/data/model.pth")


def test_a_server_of_before_mlflow_3(tracked, http_server, monkeypatch) -> None:
    info = {"run_id": "abc", "experiment_id": "0", "artifact_uri": f"{http_server.url}/files"}
    run = json.dumps({"run": {"info": info, "data": {}}}).encode()
    http_server.put("api/2.0/mlflow/runs/get", run)
    http_server.put("api/2.0/mlflow/registered-models/get", b'{"registered_model": {}}')
    http_server.put("files/dir/a.ckpt", as_bytes({"a": 1}))
    answers = {name: servers.Fault(status=404) for name in ("search", "get-latest-versions")}
    http_server.fault = lambda request: answers.get(request.path.rpartition("/")[2])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", http_server.url)
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    assert load("runs:/abc/dir/a.ckpt") == {"a": 1}
    with pytest.raises(CheckpointNotFoundError):  # there are no stages, nor such an alias
        load("models:/m/Production/a.ckpt")
    # a newer one, with many models of that name, and no such folder of this
    model = {"info": {"name": "dir", "source_run_id": "abc", "model_id": "m-1", "status": 2}}
    model["info"]["artifact_uri"] = "mlflow-artifacts:/models/m-1"
    pages = [{"models": [{**model}]}, {"models": [], "next_page_token": "2"}]
    for number in (1, 0):
        body = json.dumps(pages[number]).encode()
        pages[number] = servers.Fault(status=200, body=body)  # type: ignore[assignment] # of the case
    http_server.fault = lambda request: (
        (pages.pop() if pages else servers.Fault(status=404))
        if request.path.endswith("search")
        else None
    )
    assert load("runs:/abc/dir/a.ckpt") == {"a": 1}
    assert not pages
    http_server.fault = lambda request: answers.get(request.path.rpartition("/")[2])
    answers = {name: servers.Fault(status=503) for name in answers}
    for text in ("runs:/abc/dir/a.ckpt", "models:/m/Production/a.ckpt"):
        with pytest.raises(UnreachableError, match="says: API request"):
            load(text, retries=0)


def test_what_is_in_a_folder_of_mlflow(tracked, tmp_path: Path) -> None:
    run = logged(tracked, tmp_path)
    (tmp_path / "last.ckpt").write_bytes(as_bytes({"epoch": 1}))
    tracked.log_artifact(run, str(tmp_path / "last.ckpt"))
    tracked.create_registered_model(f"listed-{run}")
    tracked.create_model_version(f"listed-{run}", f"runs:/{run}/dir", run)

    def names(entries: Any) -> list[str]:
        return [str(entry.uri) for entry in entries]

    assert names(list_objects(f"runs:/{run}")) == [f"runs:/{run}/dir/", f"runs:/{run}/last.ckpt"]
    assert names(list_objects(f"runs:/{run}/none/")) == []
    (entry,) = find(f"runs:/{run}/**/a*.ckpt")
    assert str(entry.uri) == f"runs:/{run}/dir/a b.ckpt"
    assert entry.size == len(as_bytes(CHECKPOINT))
    assert_same(load(entry, weights), CHECKPOINT["state_dict"])
    assert names(find(f"models:/listed-{run}/1/*.ckpt")) == [f"models:/listed-{run}/1/a b.ckpt"]
    assert latest(f"runs:/{run}", key=lambda entry: entry.size).filename == "last.ckpt"
    with pytest.raises(InvalidURIError, match="does not tell when a file was written"):
        latest(f"runs:/{run}/dir")
    path = f"mlflow-artifacts:/0/{run}/artifacts/dir"
    assert names(list_objects(path)) == [f"{path}/a b.ckpt"]
    for text in (f"runs:/{run}", f"runs:/{run}/", f"models:/listed-{run}/1", path, f"{path}/"):
        with pytest.raises(InvalidURIError, match=r"names a folder; name what you want.*\.ckpt"):
            load(text)
    empty = tracked.create_run("0").info.run_id
    for text in (f"runs:/{empty}", f"runs:/{run}/none/"):
        with pytest.raises(InvalidURIError, match="there is nothing in it yet"):
            load(text)
    with pytest.raises(CheckpointNotFoundError):
        load(f"runs:/{run}/none")
    for text in (f"runs:/{run}/dir", f"models:/listed-{run}/1", path):
        with pytest.raises(CheckpointNotFoundError, match=r"is it one of these: a b.ckpt\?$"):
            load(f"{text}/a_b.ckpt")
    with pytest.raises(CheckpointNotFoundError, match="RESOURCE_DOES_NOT_EXIST"):
        list_objects("runs:/abc/dir")


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_a_folder_of_a_run_whose_files_are_in_a_store(place, tracked) -> None:
    location = place.put("listed/x", b"").removesuffix("/x")
    run = tracked.create_run(tracked.create_experiment(location, location)).info.run_id
    place.put(f"listed/{run}/artifacts/dir/a.ckpt", as_bytes({"a": 1}))
    (entry,) = list_objects(f"runs:/{run}", recursive=True)
    assert str(entry.uri) == f"runs:/{run}/dir/a.ckpt"
    assert entry.modified is not None
    assert load(latest(f"runs:/{run}/dir/")) == {"a": 1}
    assert list_objects(f"runs:/{run}/none") == []


def test_stages_of_a_model(tracked, tmp_path: Path) -> None:
    name = f"staged-{logged(tracked, tmp_path)}"
    tracked.create_registered_model(name)
    run = name.removeprefix("staged-")
    for epoch in (1, 2, 3):
        (tmp_path / "a.ckpt").write_bytes(as_bytes({"epoch": epoch}))
        tracked.log_artifact(run, str(tmp_path / "a.ckpt"), str(epoch))
        tracked.create_model_version(name, f"runs:/{run}/{epoch}", run)
    tracked.transition_model_version_stage(name, "2", "Production")
    tracked.set_registered_model_alias(name, "Staging", "3")
    assert load(f"models:/{name}/Production/a.ckpt") == {"epoch": 2}
    assert load(f"models:/{name}/production/a.ckpt") == {"epoch": 2}
    assert load(f"models:/{name}/Staging/a.ckpt") == {"epoch": 3}  # an alias of that name
    with pytest.raises(CheckpointNotFoundError):
        load("models:/none/Production/a.ckpt")


@pytest.fixture
def guarded(tracked, mlflow_server: str, monkeypatch) -> Iterator[servers.FaultProxy]:
    """The tracking server, which wants a password."""
    port = int(mlflow_server.rpartition(":")[2])
    proxy = servers.FaultProxy("http", "127.0.0.1", port)
    proxy.start()
    proxy.fault = lambda request: servers.Fault(auth="me:5ec4e7")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    yield proxy
    proxy.close()


def test_credentials_as_mlflows_client_has_them(guarded, tmp_path: Path, monkeypatch) -> None:
    proxy, guarded.fault = guarded.fault, None
    run = logged(importlib.import_module("mlflow").MlflowClient(), tmp_path)
    guarded.fault = proxy
    uri = f"runs:/{run}/dir/a b.ckpt"
    with pytest.raises(AccessDeniedError, match=r"~/\.mlflow/credentials"):
        load(uri)
    file = Path.home() / ".mlflow/credentials"
    file.parent.mkdir()
    file.write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = 5ec4e7\n")
    assert_same(load(uri, weights), CHECKPOINT["state_dict"])
    assert [each.uri.filename for each in list_objects(f"runs:/{run}/dir")] == ["a b.ckpt"]
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    with pytest.raises(AccessDeniedError) as caught:
        load(uri)
    assert "another" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "5ec4e7")
    file.unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    assert_same(load(uri, weights), CHECKPOINT["state_dict"])


def test_certificates_as_mlflows_client_has_them(tracked, monkeypatch, tmp_path: Path) -> None:
    uri = parse_uri("mlflow-artifacts:/a.ckpt")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://127.0.0.1:1")
    assert resolve(uri).tls == {"verify": None, "cert": None}
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    assert resolve(uri).tls == {"verify": False, "cert": None}
    monkeypatch.delenv("MLFLOW_TRACKING_INSECURE_TLS")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "none.pem"))
    monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(tmp_path / "me.pem"))
    assert resolve(uri).tls == {
        "verify": str(tmp_path / "none.pem"),
        "cert": str(tmp_path / "me.pem"),
    }
    with pytest.raises(UnreachableError, match="certificate is not trusted, or the file"):
        load(uri)


class Plugin:
    """A plug-in of MLflow's, which has a header of its own."""

    def get_name(self) -> str:
        return "mine"

    def get_auth(self) -> Any:
        def sign(request: Any) -> Any:
            request.headers["Authorization"] = "Signed 5ec4e7"
            return request

        return sign


def test_requests_are_signed_as_mlflows_client_signs_them(
    tracked, http_server, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", http_server.url)
    http_server.put("api/2.0/mlflow-artifacts/artifacts/a.ckpt", as_bytes({"a": 1}))
    registry = importlib.import_module("mlflow.tracking.request_auth.registry")
    providers = [*registry._request_auth_provider_registry, Plugin()]
    monkeypatch.setattr(registry._request_auth_provider_registry, "_registry", providers)
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    monkeypatch.setenv("MLFLOW_WORKSPACE", "weather")
    assert load("mlflow-artifacts:/a.ckpt") == {"a": 1}
    sent = {
        (each.headers["Authorization"], each.headers["X-MLFLOW-WORKSPACE"])
        for each in http_server.log
    }
    assert sent == {("Signed 5ec4e7", "weather")}
    http_server.reset()
    other = {"headers": {"X-Trace": "1"}}
    assert load("mlflow-artifacts:/a.ckpt", transport_params=other) == {"a": 1}
    assert {each.headers["Authorization"] for each in http_server.log} == {"Signed 5ec4e7"}
    http_server.reset()
    own = {"headers": {"Authorization": "Bearer own"}}
    assert load("mlflow-artifacts:/a.ckpt", transport_params=own) == {"a": 1}
    assert {each.headers["Authorization"] for each in http_server.log} == {"Bearer own"}
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "another")
    for uri in ("mlflow-artifacts:/a.ckpt", "runs:/abc/a.ckpt"):
        with (
            pytest.warns(UserWarning, match="Could not find any registered plugin"),
            pytest.raises(MissingPackageError, match="MLFLOW_TRACKING_AUTH is 'another'"),
        ):
            load(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_AWS_SIGV4", "true")
    for uri in ("mlflow-artifacts:/a.ckpt", "runs:/abc/a.ckpt"):
        with pytest.raises(MissingPackageError, match="pip install requests-auth-aws-sigv4"):
            load(uri)
    aws = types.SimpleNamespace(AWSSigV4=lambda service: Plugin().get_auth())
    monkeypatch.setitem(sys.modules, "requests_auth_aws_sigv4", aws)
    http_server.reset()
    assert load("mlflow-artifacts:/a.ckpt") == {"a": 1}
    assert {each.headers["Authorization"] for each in http_server.log} == {"Signed 5ec4e7"}


def test_only_what_is_needed_moves_through_the_tracking_server(tracked, tmp_path: Path) -> None:
    run = logged(tracked, tmp_path)
    report = load_into(TwoLayers(), f"runs:/{run}/dir/a b.ckpt")
    assert report.loaded == ("layer.0", "layer.1")
    assert report.bytes_moved < 400_000 * 1.02 + 2**20


class TwoLayers(torch.nn.Module):
    """Holds `layer.0` and `layer.1` of `CHECKPOINT`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.ParameterList([torch.zeros(50_000), torch.zeros(50_000)])


def test_wherever_mlflow_keeps_it(place, tracked) -> None:
    """A run's files can lie in a store, which is then read as itself."""
    location = place.put("run/a.ckpt", b"").removesuffix("/a.ckpt")
    if place.kind == "azure":
        container, _, path = location.removeprefix("az://").partition("/")
        location = f"wasbs://{container}@devstoreaccount1.blob.core.windows.net/{path}"
    run = tracked.create_run(tracked.create_experiment(location, location)).info
    place.put(f"run/{run.run_id}/artifacts/a.ckpt", as_bytes(CHECKPOINT))
    assert_same(load(f"runs:/{run.run_id}/a.ckpt", weights), CHECKPOINT["state_dict"])
    with pytest.raises(CheckpointNotFoundError) as caught:
        load(f"runs:/{run.run_id}/b.ckpt")
    assert caught.value.place == f"runs:/{run.run_id}/b.ckpt"


@pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")  # MLflow's own
def test_a_database_and_a_folder_without_a_server(
    mlflow: Any, tracked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = logged(mlflow.MlflowClient(), tmp_path)
    assert_same(load(f"runs:/{run}/dir/a b.ckpt", weights), CHECKPOINT["state_dict"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(CheckpointNotFoundError, match="there is no MLflow database at"):
        load(f"runs:/{run}/dir/a b.ckpt")
    assert not (tmp_path / "none.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(InvalidURIError, match="set MLFLOW_TRACKING_URI to the server's URL"):
        load(f"mlflow-artifacts:/0/{run}/artifacts/dir/a b.ckpt")


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("runs:/", InvalidURIError, "write runs:/<run_id>/path"),
        ("runs:/abc", CheckpointNotFoundError, "says: RESOURCE_DOES_NOT_EXIST"),
        ("mlflow-artifacts:/", InvalidURIError, "names no file"),
        ("models:/a", InvalidURIError, "names no file"),
        ("models:/a/1/", CheckpointNotFoundError, "says: RESOURCE_DOES_NOT_EXIST"),
        ("models:/a/last.ckpt", CheckpointError, "says: INVALID_PARAMETER_VALUE"),
        ("models:/@x/a.ckpt", InvalidURIError, "names no file"),
        ("runs:/abc/a.ckpt", CheckpointNotFoundError, "says: RESOURCE_DOES_NOT_EXIST"),
        ("models:/none/1/a.ckpt", CheckpointNotFoundError, "says: RESOURCE_DOES_NOT_EXIST"),
        ("models:/none/best/a.ckpt", CheckpointNotFoundError, "says: RESOURCE_DOES_NOT_EXIST"),
        ("models:/bad'name@x/a.ckpt", CheckpointNotFoundError, "says: RESOURCE_DOES_NOT_EXIST"),
        ("mlflow-artifacts:/none/a.ckpt", CheckpointNotFoundError, "there is no such object"),
    ],
)
def test_what_mlflow_does_not_know(tracked, text: str, error, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        load(text)
    assert caught.value.place == text


def test_what_mlflow_finds_wrong_is_told(tracked, http_server, monkeypatch) -> None:
    said = b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "an odd run"}'
    http_server.fault = lambda request: servers.Fault(status=400, body=said)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", http_server.url)
    with pytest.raises(CheckpointError, match="INVALID_PARAMETER_VALUE: an odd run") as caught:
        load("runs:/abc/a.ckpt")
    assert type(caught.value) is CheckpointError


def test_a_model_that_is_said_to_be_in_itself(tracked, http_server, monkeypatch) -> None:
    model, location = b'{"registered_model": {}}', b'{"artifact_uri": "models:/circle/1"}'
    http_server.put("api/2.0/mlflow/registered-models/get", model)
    http_server.put("api/2.0/mlflow/model-versions/get-download-uri", location)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", http_server.url)
    with pytest.raises(InvalidURIError, match="leads to models:/circle/1/a"):
        load("models:/circle/1/a.ckpt")


def test_a_tracking_server_that_is_not_there(tracked, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{servers.free_port()}")
    with pytest.raises(UnreachableError, match="check the name, and MLFLOW_TRACKING_URI"):
        load("runs:/abc/a.ckpt", retries=1)


def test_a_password_of_the_tracking_server_shows_nowhere(tracked, monkeypatch) -> None:
    nowhere = f"http://me:5ec4e7@127.0.0.1:{servers.free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere)
    for text in ("runs:/abc/a.ckpt", "mlflow-artifacts:/a.ckpt"):
        with pytest.raises(UnreachableError) as caught:
            load(text, retries=0)
        assert "5ec4e7" not in "".join(traceback.format_exception(caught.value))


def test_credentials_of_the_tracking_server_go_to_it_alone(
    tracked, http_server, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{http_server.url}/prefix/")
    prefix = "prefix/api/2.0/mlflow-artifacts/artifacts"
    http_server.put(f"{prefix}/dir/a.ckpt", as_bytes({"a": 1}))
    other = servers.HTTPServer()
    other.start()
    other.put(f"{prefix}/dir/a.ckpt", as_bytes({"a": 2}))

    def asked_with(text: str, server: servers.Server) -> set[str | None]:
        server.reset()
        assert load(text)
        return {request.headers["Authorization"] for request in server.log}

    def here() -> set[str | None]:
        return asked_with("mlflow-artifacts:/dir/a.ckpt", http_server)

    assert here() == {None}
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "5ec4e7")
    assert here() == {"Bearer 5ec4e7"}
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "5ec4e7")
    assert here() == {"Basic bWU6NWVjNGU3"}
    assert asked_with(f"mlflow-artifacts://127.0.0.1:{other.port}/dir/a.ckpt", other) == {None}
    other.close()
    http_server.fault = lambda request: servers.Fault(status=401)
    with pytest.raises(AccessDeniedError, match="set MLFLOW_TRACKING_TOKEN"):
        load("mlflow-artifacts:/dir/a.ckpt")
    with pytest.raises(AccessDeniedError, match="set MLFLOW_TRACKING_TOKEN") as caught:
        load("runs:/abc/a.ckpt")
    assert "5ec4e7" not in str(caught.value)


def test_mlflow_that_is_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'anemoi-ckpt\[mlflow\]'"):
        load("runs:/abc/a.ckpt")


# ── README ────────────────────────────────────────────────────────────────────────────────────


def test_readme_hubs(hub: Hub, tracked, tmp_path: Path) -> None:
    state = {"encoder.w": torch.ones(3), "decoder.w": torch.ones(4)}
    index = {"weight_map": dict.fromkeys(state, "model-1.safetensors")}
    files = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": safetensors.torch.save(state),
    }
    hub.commit("owner/repo", files)
    checkpoint = {"state_dict": state, "optimizer_states": [torch.ones(9)]}
    run_id = tracked.create_run("0").info.run_id
    for name in ("epoch=1-step=4.ckpt", "last.ckpt"):
        (tmp_path / name).write_bytes(as_bytes(checkpoint))
        tracked.log_artifact(run_id, str(tmp_path / name), "epoch=1-step=4")
    tracked.create_registered_model("weather")
    tracked.create_model_version("weather", f"runs:/{run_id}/epoch=1-step=4", run_id)
    tracked.set_registered_model_alias("weather", "champion", "1")
    results = [
        eval(line, {**strategies.__dict__, "load": load, "run_id": run_id})
        for line in marked("hubs").splitlines()
    ]
    wanted = [{"encoder.w": torch.ones(3)}, state, {"state_dict": state}]
    for result, expected in zip(results, wanted, strict=True):
        assert_same(result, expected)


def test_a_place_of_ones_own_that_knows_where_a_file_is(tmp_path: Path) -> None:
    class LatestURI(URI):
        """latest:///folder"""

    @resolve.register
    def _(uri: LatestURI, transport_params=None) -> URI:
        folder = Path(str(uri).removeprefix("latest://"))
        return LocalURI(str(uri), str(max(folder.iterdir())))

    register_scheme("latest", LatestURI)
    try:
        for epoch in (1, 2):
            torch.save({"epoch": epoch}, tmp_path / f"{epoch}.ckpt")
        assert load(f"latest://{tmp_path}") == {"epoch": 2}
        with pytest.raises(MismatchError) as caught:
            load_into(torch.nn.Linear(1, 1), f"latest://{tmp_path}")
        assert caught.value.place == f"latest://{tmp_path}"
    finally:
        _anemoi_ckpt.places._PARSERS.pop("latest", None)


# ── offline ───────────────────────────────────────────────────────────────────────────────────


def test_offline_a_copy_serves_by_the_hubs_own_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"hf://{REPO}/run/last.ckpt"
    hub.commit(REPO, {"run/last.ckpt": as_bytes(CHECKPOINT)})
    assert_same(load(uri, cached=True), CHECKPOINT)
    hub.stop()
    with pytest.raises(UnreachableError, match="set ANEMOI_CKPT_OFFLINE=1 to take the copy"):
        load(uri, cached=True, retries=0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.log.clear()
    assert_same(load(uri, cached=True), CHECKPOINT)
    path = download(uri)
    assert_same(load(path), CHECKPOINT)
    assert hub.log == []
    with pytest.raises(TypeError, match="means nothing"):
        load(uri, cached=True, transport_params={"clientt": 1})
    for other in ("run/other.ckpt", "last.ckpt"):
        with pytest.raises(UnreachableError):
            load(f"hf://{REPO}/{other}", cached=True, retries=0)
    path.write_bytes(as_bytes(CHECKPOINT)[:-1])  # no longer sound: the hub is asked
    with pytest.raises(UnreachableError):
        load(uri, cached=True, retries=0)


def test_offline_a_copy_serves_by_mlflows_own_name(
    tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = logged(tracked, tmp_path)
    uri = f"runs:/{run}/dir/a b.ckpt"
    assert_same(load(uri, cached=True), CHECKPOINT)
    monkeypatch.setenv("ANEMOI_CKPT_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "mlflow", None)  # which is what would ask
    assert_same(load(uri, cached=True), CHECKPOINT)
    with pytest.raises(ImportError):
        load(f"runs:/{run}/dir/b.ckpt", cached=True)
