"""What a place tells of the objects in it, and what is removed from it."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

import _anemoi_ckpt.transport
import anemoi_ckpt
import servers
from anemoi_ckpt import (
    URI,
    AccessDeniedError,
    CheckpointNotFoundError,
    Entry,
    InvalidURIError,
    Page,
    latest,
    list_objects,
    list_page,
    load,
    parse_uri,
    register_scheme,
    remove_object,
)
from checkpoints import as_bytes

DATA = as_bytes({"w": torch.ones(3)})
STORES = ["s3", "gcs", "azure"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)


def folder_of(uri: object) -> str:
    return str(uri).rpartition("/")[0]


def names(entries: list[Entry]) -> list[str]:
    """Their paths beneath the folder `run`."""
    return [str(each.uri).partition("/run/")[2] for each in entries]


# ── list ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["local", *STORES], indirect=True)
def test_a_folder_tells_what_is_in_it(place) -> None:
    began = datetime.now(UTC) - timedelta(minutes=1)
    for name in ("a b.ckpt", "é.ckpt", "deep/c.ckpt", "deep/er/d.ckpt"):
        place.put(f"run/{name}", DATA)
    folder = folder_of(place.put("run/last.ckpt", DATA))
    entries = list_objects(folder)
    assert sorted(names(entries)) == ["a b.ckpt", "deep/", "last.ckpt", "é.ckpt"]
    assert [each.is_folder for each in entries].count(True) == 1
    for each in entries:
        if not each.is_folder:
            assert each.size == len(DATA)
            assert began < each.modified < began + timedelta(minutes=30)
            assert load(each.uri)["w"].all()
            assert load(str(each.uri))["w"].all()  # the text names it, too
        else:
            assert names(list_objects(each.uri)) == ["deep/c.ckpt", "deep/er/"]
    every = list_objects(f"{folder}/", recursive=True)
    expected = ["a b.ckpt", "deep/c.ckpt", "deep/er/d.ckpt", "last.ckpt", "é.ckpt"]
    assert sorted(names(every)) == expected


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_a_listing_begins_with_what_is_asked_for(place) -> None:
    for name in ("epoch=1.ckpt", "epoch=12.ckpt", "last.ckpt"):
        uri = place.put(f"run/{name}", DATA)
    beginning = parse_uri(f"{folder_of(uri)}/epoch")
    assert names(anemoi_ckpt.list_page(beginning).entries) == ["epoch=1.ckpt", "epoch=12.ckpt"]


def test_a_listing_of_files_begins_with_what_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("epoch=1.ckpt", "epoch=12.ckpt", "last.ckpt"):
        Path(name).write_bytes(DATA)
    found = anemoi_ckpt.list_page(parse_uri("ep")).entries
    assert [str(each.uri) for each in found] == ["epoch=1.ckpt", "epoch=12.ckpt"]
    found = anemoi_ckpt.list_page(parse_uri("./la")).entries
    assert [str(each.uri) for each in found] == ["./last.ckpt"]


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_a_bucket_is_a_folder(place) -> None:
    uri = place.put("run/last.ckpt", DATA)
    bucket = "/".join(str(uri).split("/")[:3])
    assert parse_uri(uri) in {each.uri for each in list_objects(bucket, recursive=True)}


def test_more_than_a_page(s3: servers.Store) -> None:
    for number in range(1_003):
        s3.write(f"pages/{number:04}.ckpt", b"x")
    s3.server.log.clear()
    folder = s3.uri("pages")
    entries = list_objects(folder)
    assert [each.uri.filename for each in entries] == [f"{n:04}.ckpt" for n in range(1_003)]
    assert [request.status for request in s3.server.log] == [200, 200]


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_a_page_that_fails_is_asked_for_again(place) -> None:
    folder = folder_of(place.put("run/last.ckpt", DATA))
    place.server.faults.append(servers.Fault(status=503, headers={"Retry-After": "0"}))
    assert names(list_objects(folder)) == ["last.ckpt"]
    place.server.faults.append(servers.Fault(status=503, headers={"Retry-After": "0"}))
    with pytest.raises(anemoi_ckpt.UnreachableError):
        list_objects(folder, retries=0)


def test_a_folder_that_is_not_there(tmp_path: Path, s3: servers.Store) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        list_objects(tmp_path / "run")
    (tmp_path / "file").write_bytes(DATA)
    with pytest.raises(CheckpointNotFoundError):
        list_objects(tmp_path / "file")
    assert list_objects(s3.uri("never")) == []
    with pytest.raises(CheckpointNotFoundError):
        list_objects("s3://no-such-bucket/run")


def test_links_in_a_circle_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(DATA)
    (folder / "circle").symlink_to(folder)
    (folder / "gone.ckpt").symlink_to(folder / "nothing")
    assert names(list_objects(folder, recursive=True)) == ["last.ckpt"]


def test_a_folder_that_vanishes_meanwhile_is_left_out(tmp_path: Path, monkeypatch) -> None:
    for name in ("deep", "other"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "a.ckpt").write_bytes(DATA)
    scandir = os.scandir

    def vanishing(path: str) -> object:
        if path.endswith("deep/"):
            Path(path, "a.ckpt").unlink()
            Path(path).rmdir()
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", vanishing)
        every = list_objects(tmp_path / "run", recursive=True)
    assert names(every) == ["other/a.ckpt"]


def test_places_that_list_nothing(http_server: servers.HTTPServer) -> None:
    with pytest.raises(InvalidURIError, match="HTTPURI does not tell what is in it"):
        list_objects(http_server.url)
    with pytest.raises(TypeError, match="transport_params"):
        list_objects("s3://b/run", transport_params={"clinet": None})


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("s3://b//", "/"),
        ("s3://b/a//", "a//"),
        ("s3://b/a ?sig=1", "a ?sig=1/"),
        ("run ?sig=1", "run ?sig=1/"),
        ("file:///", "/"),
        ("/", "/"),
        ("s3://b", ""),
    ],
)
def test_what_a_folder_is_called(text: str, path: str) -> None:
    uri = _anemoi_ckpt.places.parse_folder(text)
    assert getattr(uri, uri.path_field) == path


def test_marks_of_empty_folders_are_folders(s3: servers.Store) -> None:
    for name in ("marks/", "marks/empty/", "marks/a.ckpt"):
        s3.sdk.put_object(Bucket="checkpoints", Key=name, Body=b"")
    assert [each.is_folder for each in list_objects(s3.uri("marks"))] == [False, True]
    assert [e.uri.filename for e in list_objects(s3.uri("marks"), recursive=True)] == ["a.ckpt"]


def test_a_text_is_listed_and_removed(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(DATA)
    assert names(anemoi_ckpt.list_page(str(tmp_path)).entries) == [""]
    remove_object(str(tmp_path / "a.ckpt"))
    assert list(tmp_path.iterdir()) == []


def test_a_signature_follows_the_folder() -> None:
    folder = anemoi_ckpt.AzureURI
    uri = _anemoi_ckpt.places.parse_folder("az://c/run?sv=1&sig=x")
    assert isinstance(uri, folder)
    assert (uri.blob, uri.sas) == ("run/", "sv=1&sig=x")
    host = "https://acc.blob.core.windows.net/c"
    uri = _anemoi_ckpt.places.parse_folder(f"{host}/a%20b/?sig=x")
    assert (uri.blob, str(uri)) == ("a b/", f"{host}/a%20b/?sig=x")
    assert str(Entry.beneath(uri, "a b/c d.ckpt").uri) == f"{host}/a%20b/c%20d.ckpt?sig=x"


def test_names_of_all_kinds_come_back(tmp_path: Path, s3: servers.Store) -> None:
    names = (".hidden", " a ", "a\nb", "b%20c", "d?e", "f#1", "é")
    for name in names:
        (tmp_path / name).write_bytes(DATA)
        if "\n" not in name:  # which moto refuses
            s3.write(f"odd/{name}", DATA)
    for folder in (str(tmp_path), tmp_path.as_uri(), s3.uri("odd")):
        entries = list_objects(folder)
        found = {each.uri.filename for each in entries}
        assert found == ({*names} - {"a\nb"} if folder.startswith("s3:") else {*names})
        for each in entries:
            assert load(str(each.uri))["w"].all()
    with pytest.raises(TypeError, match="unset"):
        list_objects(None)  # type: ignore[arg-type] # the case


# ── latest ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["local", *STORES], indirect=True)
def test_the_newest_checkpoint_of_a_folder(place) -> None:
    folder = folder_of(place.put("run/notes.txt", b"x"))
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint.*\n?.*notes.txt"):
        latest(folder)
    first = place.put("run/z.ckpt", DATA)
    assert load(latest(folder))["w"].all()
    assert latest(folder, key=lambda entry: entry.size) == parse_uri(first)


def test_the_newest_is_the_one_that_was_written_last(tmp_path: Path) -> None:
    (tmp_path / "folder.ckpt").mkdir()
    for number, name in enumerate(["c.ckpt", "a.pt", "b.safetensors", "d.txt"]):
        (tmp_path / name).write_bytes(DATA)
        os.utime(tmp_path / name, (1_000 + number, 1_000 + number))
    assert latest(tmp_path).filename == "b.safetensors"
    os.utime(tmp_path / "a.pt", (1_002, 1_002))
    assert latest(tmp_path).filename == "b.safetensors"  # of equals the last by name
    assert latest(tmp_path, key=lambda entry: -entry.modified.timestamp()).filename == "c.ckpt"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointNotFoundError, match="it is empty"):
        latest(empty)


# ── remove ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["local", *STORES], indirect=True)
def test_what_is_removed_is_gone(place) -> None:
    uri = parse_uri(place.put("run/last.ckpt", DATA))
    remove_object(uri)
    with pytest.raises(CheckpointNotFoundError):
        load(uri)
    remove_object(uri)  # there is none
    place.put("run/last.ckpt", DATA)  # which the fixture removes


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_nothing_is_removed_from_a_bucket_that_is_not_there(place) -> None:
    uri = place.put("a.ckpt", DATA)
    scheme, _, rest = uri.partition("://")
    with pytest.raises(CheckpointNotFoundError, match="no such bucket or container"):
        remove_object(f"{scheme}://no-such-bucket-here/{rest.partition('/')[2]}")
    assert place.server.log


@pytest.mark.parametrize(
    ("answers", "missing", "requests"),
    [
        ({"DELETE": (404, "The specified bucket does not exist.")}, "bucket", 1),
        ({"DELETE": (404, "No such object: b/a.ckpt")}, "", 1),
        ({"DELETE": (404, "Not Found"), "GET": (404, "")}, "bucket", 2),
        ({"DELETE": (404, "Not Found"), "GET": (403, "")}, "", 2),
        ({"DELETE": (404, "Not Found")}, "", 2),
        ({"DELETE": (403, "No")}, "denied", 1),
    ],
)
def test_what_a_server_of_gcs_says_is_missing(gcs, answers, missing: str, requests: int) -> None:
    """Google tells a bucket from an object; of others it is asked."""

    def fault(request: servers.Request) -> servers.Fault | None:
        status, said = answers.get(request.method, (0, ""))
        body = json.dumps({"error": {"code": status, "message": said}}).encode()
        headers = {"Content-Type": "application/json"}
        return servers.Fault(status=status, body=body, headers=headers) if status else None

    gcs.server.fault = fault
    if missing:
        with pytest.raises(anemoi_ckpt.CheckpointError, match=missing):
            remove_object(gcs.uri("a.ckpt"))
    else:
        remove_object(gcs.uri("a.ckpt"))
    assert len(gcs.server.log) == requests


@pytest.mark.parametrize("verb", [load, list_objects, lambda uri: anemoi_ckpt.save({}, uri)])
@pytest.mark.parametrize("place", STORES, indirect=True)
def test_a_bucket_that_is_not_there_is_told_as_one(place, verb) -> None:
    scheme, _, rest = place.put("a.ckpt", DATA).partition("://")
    uri = f"{scheme}://no-such-bucket-here/{rest.partition('/')[2]}"
    with pytest.raises(CheckpointNotFoundError, match="no such bucket or container"):
        verb(uri)


def test_what_cannot_be_removed(tmp_path: Path, http_server: servers.HTTPServer) -> None:
    with pytest.raises((InvalidURIError, AccessDeniedError)):  # Linux and macOS differ
        remove_object(parse_uri(tmp_path))
    assert tmp_path.exists()
    with pytest.raises(InvalidURIError, match="nothing can be removed"):
        remove_object(parse_uri(http_server.put("a.ckpt", DATA)))


# ── names that are like a wrong one ───────────────────────────────────────────────────────────

READS = {
    "load": load,
    "peek": anemoi_ckpt.peek,
    "download": anemoi_ckpt.download,
    "cached": lambda uri: load(uri, cached=True),
}


@pytest.mark.parametrize("place", ["local", *STORES], indirect=True)
@pytest.mark.parametrize("read", READS)
def test_a_wrong_name_tells_those_that_are_like_it(place, read: str) -> None:
    place.put("run/deep/lost.ckpt", DATA)
    place.put("run/other.txt", DATA)
    folder = folder_of(place.put("run/last.ckpt", DATA))
    with pytest.raises(CheckpointNotFoundError) as caught:
        READS[read](f"{folder}/lasst.ckpt")
    assert str(caught.value).endswith("; is it one of these: last.ckpt?")
    with pytest.raises(CheckpointNotFoundError, match="check the name"):
        READS[read](f"{folder}/xyz")
    with pytest.raises(CheckpointNotFoundError, match=r"one of these: deep/\?$"):
        READS[read](f"{folder}/deeep")


@pytest.mark.parametrize("place", STORES, indirect=True)
@pytest.mark.parametrize("status", [403, 503])
def test_who_may_not_list_gets_no_names_and_no_other_error(place, status: int) -> None:
    folder = folder_of(place.put("run/last.ckpt", DATA))
    listings = []

    def refuse(request: servers.Request) -> servers.Fault | None:
        if "/run/" in request.path or "%2Frun%2F" in request.path:
            return None
        listings.append(request)
        return servers.Fault(status=status)

    place.server.fault = refuse
    with pytest.raises(CheckpointNotFoundError) as caught:
        load(f"{folder}/lasst.ckpt")
    assert str(caught.value).endswith("; check the name for typing errors")
    assert not isinstance(caught.value.__context__, AccessDeniedError)
    assert len(listings) == 1


def test_a_place_that_tells_no_times_wants_a_key(tmp_path: Path) -> None:
    class Timeless(URI):
        """timeless://host/path"""

    register_scheme("timeless", Timeless)
    names = ["timeless://host/run/a.ckpt", "timeless://host/run/b.ckpt"]
    list_page.register(Timeless, lambda *_, **__: Page([Entry(parse_uri(n), 1) for n in names]))
    with pytest.raises(InvalidURIError, match="does not tell when a file was written; give a key="):
        latest("timeless://host/run/")
    assert latest("timeless://host/run/", key=lambda entry: entry.uri.filename).text == names[1]
