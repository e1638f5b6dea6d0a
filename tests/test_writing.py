"""Writing to a place: all or nothing."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anemoi_ckpt
import servers
from _anemoi_ckpt.places import s3 as s3_place
from anemoi_ckpt import (
    AccessDeniedError,
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    UnreachableError,
    load,
    metadata,
    open_stream,
    open_writer,
    parse_uri,
    save,
)

LARGE = os.urandom(1024) * 20 * 1024  # more than one part of an upload


def stored(uri: str) -> bytes:
    with open_stream(uri) as stream:
        return bytes(stream.read())


@pytest.fixture
def writable(place: Any) -> Any:
    if place.kind == "http":
        pytest.skip("nothing writes over HTTP")
    return place


@pytest.mark.parametrize("data", [b"", b"small", LARGE], ids=len)
def test_what_is_written_is_there(writable: Any, data: bytes) -> None:
    uri = writable.put("a.ckpt", b"before")
    with open_writer(uri) as stream:
        for start in range(0, len(data), 3_000_000):
            stream.write(data[start : start + 3_000_000])
    assert stored(uri) == data


def write_half(uri: str, data: bytes, failure: type[BaseException]) -> None:
    with open_writer(parse_uri(uri)) as stream:
        stream.write(data)
        raise failure("half-way")


@pytest.mark.parametrize("size", [5, len(LARGE)])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(writable: Any, size: int, failure: Any) -> None:
    uri = writable.put("a.ckpt", b"before")
    with pytest.raises(failure, match="half-way"):  # the writer's own error, as it is
        write_half(uri, LARGE[:size], failure)
    assert stored(uri) == b"before"
    if writable.kind == "s3":
        found = writable.store.sdk.list_multipart_uploads(Bucket=parse_uri(uri).bucket)
        assert found.get("Uploads", []) == []


def test_a_failure_leaves_no_new_object(writable: Any) -> None:
    uri = writable.put("a.ckpt", b"") + ".new"
    with pytest.raises(RuntimeError, match="half-way"):
        write_half(uri, LARGE, RuntimeError)
    with pytest.raises(CheckpointNotFoundError):
        stored(uri)


def test_a_checkpoint_that_cannot_be_pickled_leaves_what_was_there(writable: Any) -> None:
    uri = writable.put("a.ckpt", b"before")
    with pytest.raises(CheckpointError, match="the checkpoint cannot be written"):
        save({"w": torch.ones(5_000_000), "f": lambda: None}, uri)
    assert stored(uri) == b"before"


def test_a_store_that_does_not_answer(writable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smart_open.s3.RETRY.attempts", 1)
    monkeypatch.setattr("smart_open.s3.RETRY.sleep_seconds", 0)
    if writable.kind == "gcs":
        pytest.skip("its SDK tries for two minutes")
    uri = writable.unreachable()
    if uri is None:
        pytest.skip("a disk answers")
    with pytest.raises(UnreachableError):
        save({"w": torch.ones(3)}, uri)


def test_local_files_are_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no folder")
    for path, kind in {
        tmp_path / "missing" / "a.ckpt": CheckpointNotFoundError,
        tmp_path / "file" / "a.ckpt": CheckpointError,
        Path("/dev/full") / "a": CheckpointError,
    }.items():
        with pytest.raises(kind, match=r"it cannot be written .*; check the folder"):
            save({"w": torch.ones(1)}, path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors", ".ckpt.bz2"])
def test_a_disk_that_fills_up(tmp_path: Path, ending: str) -> None:
    resource = pytest.importorskip("resource")
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot be written \(File too large\); check.*disk"
        ):
            save({"w": torch.rand(1_000_000)}, tmp_path / f"a{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")  # root may write everywhere

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AccessDeniedError, match="Permission denied"):
        save({"w": torch.ones(1)}, tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("https://host/a.ckpt", "HTTPURI cannot be written to; write to a path"),
        ("s3://bucket/a.ckpt?versionId=3", "names a version that is there"),
        ("gs://bucket/a.ckpt#3", "names a version that is there"),
    ],
)
def test_what_cannot_be_written_to(uri: str, said: str, s3: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    with pytest.raises(InvalidURIError, match=said):
        save({"w": torch.ones(1)}, uri)


def test_a_bucket_that_is_not_there(s3: Any) -> None:
    with pytest.raises(CheckpointNotFoundError, match="s3://no-such-bucket/a: there is no such"):
        save({"w": torch.ones(1)}, "s3://no-such-bucket/a")


def test_a_store_that_refuses_half_way(s3: Any) -> None:
    s3.write("a.ckpt", b"before")
    s3.server.fault = lambda request: (
        servers.Fault(status=403) if "partNumber=2" in request.query else None
    )
    with pytest.raises(AccessDeniedError):
        save(
            {"w": torch.ones(4_000_000)},
            s3.uri("a.ckpt"),
            transport_params={"min_part_size": 5 * 1024**2},
        )
    s3.server.reset()
    assert stored(s3.uri("a.ckpt")) == b"before"


def test_a_stream_can_be_wrapped(s3: Any) -> None:
    with open_writer(s3.uri("a.txt")) as stream, io.BufferedWriter(stream) as buffered:
        buffered.write(b"line by line\n")
    assert stored(s3.uri("a.txt")) == b"line by line\n"


def test_a_client_of_ones_own(s3_store: Any, tmp_path: Path) -> None:
    s3_store.server.reset()
    uri = s3_store.uri("own/a.ckpt")
    params = {"client": s3_store.sdk}
    save({"w": torch.ones(2)}, uri, transport_params=params)
    assert load(uri, transport_params=params)["w"].tolist() == [1, 1]


# ── views ─────────────────────────────────────────────────────────────────────────────────────

BIG = torch.arange(1_000_000, dtype=torch.float32).view(1000, 1000)


class Holder:
    """Holds a tensor in a way of its own."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


VIEWS: dict[str, torch.Tensor] = {
    "rows": BIG[10:12],
    "a row, transposed": BIG[3:5].T,
    "a column": BIG[:, 7],
    "expanded": BIG[0, :3].expand(500, 3),
    "nothing": BIG[:0],
    "a parameter": nn.Parameter(BIG[1:3]),
    "a frozen parameter": nn.Parameter(BIG[1:3], requires_grad=False),
    "wants a gradient": BIG[1:3].detach().requires_grad_(),
    "a scalar": BIG[5, 5],
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path, kind: str) -> None:
    view = VIEWS[kind]
    held = {"a": view, "b": [view.detach()] if kind != "nothing" else [], "c": torch.ones(2)}
    found = load(save(held, tmp_path / "a.ckpt"))
    assert torch.equal(found["a"], view)
    assert type(found["a"]) is type(view)
    assert found["a"].requires_grad is view.requires_grad
    assert (tmp_path / "a.ckpt").stat().st_size < 20_000
    if kind != "a column":
        assert found["a"].stride() == view.stride()
    if kind != "nothing":  # the same view twice shares memory again
        assert found["b"][0].data_ptr() == found["a"].data_ptr()
    assert torch.equal(torch.load(tmp_path / "a.ckpt")["a"], view)


@pytest.mark.parametrize(
    "other",
    [BIG, BIG[12:13], Holder(BIG[12:13]), nn.Parameter(BIG.view(-1)[:5])],
    ids=["all", "others", "in an object", "a parameter"],
)
def test_views_that_share_a_storage_share_it_again(tmp_path: Path, other: Any) -> None:
    save({"a": BIG[10:12], "b": other}, tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=False)
    second = found["b"].tensor if isinstance(other, Holder) else found["b"]
    found["a"].untyped_storage().fill_(0)
    assert not second.any()


def test_what_is_more_than_a_view_is_written_as_it_is(tmp_path: Path) -> None:
    marked = BIG[:2].detach()
    marked.mine = 3  # type: ignore[attr-defined] # the case
    found = load(save({"a": marked, "b": torch.ones(4)}, tmp_path / "a.ckpt"))
    assert found["a"].mine == 3
    assert (tmp_path / "a.ckpt").stat().st_size > 4_000_000
    turned = torch.view_as_complex(BIG[:2].view(2, 500, 2)).conj()
    assert torch.equal(load(save([turned], tmp_path / "a.ckpt"))[0], turned)


# ── files ─────────────────────────────────────────────────────────────────────────────────────


def test_permissions_stay_and_links_are_followed(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.ckpt"
    target.parent.mkdir()
    save({"w": torch.zeros(1)}, target)
    target.chmod(0o640)
    link = tmp_path / "last.ckpt"
    link.symlink_to(target)
    save({"w": torch.ones(1)}, link)
    assert link.is_symlink()
    assert load(target)["w"].item() == 1
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in target.parent.iterdir()) == ["a.ckpt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no paths here")
def test_a_pipe_and_links_that_lead_nowhere(tmp_path: Path) -> None:
    pipe, circle, link = tmp_path / "pipe", tmp_path / "circle", tmp_path / "link"
    os.mkfifo(pipe)
    with pytest.raises(InvalidURIError, match="a pipe or a device, not a file; save it to a file"):
        save({"w": torch.ones(1)}, pipe)
    assert pipe.is_fifo()
    circle.symlink_to(circle)
    with pytest.raises(CheckpointError, match=r"cannot be written.*links"):
        save({"w": torch.ones(1)}, circle)
    assert circle.is_symlink()
    link.symlink_to(tmp_path / "none")
    with pytest.raises(CheckpointNotFoundError, match=r"this link leads to .*/none, which is not"):
        load(link)
    save({"w": torch.ones(1)}, link)
    assert load(tmp_path / "none")["w"].item() == 1
    assert link.is_symlink()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("folder", [".", "", "new/"])
def test_a_folder_is_not_written_to(folder: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidURIError, match=r"a folder|is empty"):
        save({"w": torch.ones(1)}, folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [200, 218, 247, 255])
def test_names_as_long_as_a_disk_takes_them(length: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ANEMOI_CKPT_CACHE", str(tmp_path / "cache"))
    name = "é" * ((length - 5) // 2) + "x" * ((length - 5) % 2) + ".ckpt"
    path = save({"w": torch.ones(1)}, tmp_path / name)
    assert len(os.fsencode(name)) == length
    for copied in (anemoi_ckpt.download(path, f"{tmp_path}/new/run/"), anemoi_ckpt.download(path)):
        assert copied.name == name
        assert load(copied)["w"].item() == 1
    too_long = tmp_path / ("x" * 256)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save({"w": torch.ones(1)}, too_long)


def test_safetensors_says_that_it_is_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save({"w": torch.ones(2)}, path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("names", [["__metadata__"], [0, "0"]])
def test_names_that_safetensors_cannot_hold(names: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=f"one tensor called {names[-1]}"):
        save({name: torch.zeros(1) for name in names}, path)
    assert load(path)["w"].all()  # as it was


# ── S3's checksums ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, "when_required"),
        ({"AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported"}, "when_supported"),
        ({"AWS_ENDPOINT_URL": ""}, "when_supported"),  # Amazon's own
    ],
)
def test_stores_that_know_no_new_checksums_get_none(
    environment: dict[str, str], asked: str, s3: servers.Store, monkeypatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = s3_place.client_of(anemoi_ckpt.parse_uri(s3.uri("a.ckpt")), None)
    assert client.meta.config.request_checksum_calculation == asked


def test_a_profile_may_ask_for_checksums(s3: servers.Store, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = when_supported\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    client = s3_place.client_of(anemoi_ckpt.parse_uri(s3.uri("a.ckpt")), None)
    assert client.meta.config.request_checksum_calculation == "when_supported"


def refuses_checksums(request: servers.Request) -> servers.Fault | None:
    """As a store that knows neither of the headers, nor trailers."""
    names = {name.lower() for name in request.headers}
    known = {"x-amz-checksum-mode", "x-amz-trailer", "x-amz-sdk-checksum-algorithm"}
    return servers.Fault(status=501) if names & known else None


@pytest.mark.parametrize("chosen", [None, "when_required"])
def test_a_store_that_knows_no_checksums(
    chosen: str | None, s3: servers.Store, tmp_path: Path, monkeypatch
) -> None:
    s3.server.fault = refuses_checksums
    if chosen:
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", chosen)
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", chosen)
    uri = save({"w": torch.arange(3)}, s3.uri("plain/a.ckpt"))
    assert load(uri)["w"].tolist() == [0, 1, 2]
    assert load(anemoi_ckpt.download(uri, tmp_path / "a.ckpt"))["w"].tolist() == [0, 1, 2]
    with open_stream(uri) as stream:
        assert len(stream.read()) > 0
    refused = [request for request in s3.server.log if request.status == 501]
    assert {request.method for request in refused} == (set() if chosen else {"HEAD"})


def test_a_checkpoint_without_metadata_gives_none(tmp_path: Path) -> None:
    source = save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    copied = save({"b": torch.ones(1)}, tmp_path / "b.ckpt", metadata=source)
    with pytest.raises(CheckpointNotFoundError, match=r"no anemoi.json"):
        metadata(copied)
    assert load(copied)["b"].tolist() == [1]
