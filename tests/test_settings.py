"""Anemoi's settings tell which endpoint and keys a bucket has, and show none of them."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch

import needs
import servers
from _anemoi_ckpt.places.settings import StoreSettings, store_settings
from anemoi_ckpt import CheckpointError, MissingPackageError, list_objects, load, save
from checkpoints import as_bytes

SECRET = "hunter2+Zm"
KEYS = f'access_key_id = "AKIA"\nsecret_access_key = "{SECRET}"\n'


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "settings.toml"
    monkeypatch.setenv("ANEMOI_SETTINGS_FILE", str(path))
    return path


def write(path: Path, text: str, mode: int = 0o600) -> None:
    path.write_text(text, "utf-8")
    path.chmod(mode)


@pytest.fixture(scope="module")
def two() -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(servers.s3_store()) for _ in range(2)]


@pytest.mark.parametrize("scheme", ["s3", "s3a", "s3n"])
def test_two_buckets_at_two_endpoints(two, settings: Path, monkeypatch, scheme: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    sections = []
    for number, (store, name) in enumerate(zip(two, ("one", "two"), strict=True)):
        # one process's motos share what they store, so it is the proxies that tell who was asked
        store.sdk.create_bucket(Bucket=f"{name}-bucket")
        data = as_bytes({"w": torch.full((3,), number)})
        store.sdk.put_object(Bucket=f"{name}-bucket", Key="a.ckpt", Body=data)
        url = store.environment["AWS_ENDPOINT_URL"]
        sections.append(f'[object-storage."{name}-*"]\nendpoint_url = "{url}"\n{KEYS}')
    write(settings, "\n".join(sections))
    for number, name in enumerate(("one", "two")):
        asked, other = two[number].server, two[1 - number].server
        asked.log.clear()
        other.log.clear()
        folder = f"{scheme}://{name}-bucket/"
        assert load(f"{folder}a.ckpt")["w"].tolist() == [number] * 3
        save({"w": torch.tensor(number)}, f"{folder}{scheme}/b.ckpt")
        (entry,) = list_objects(f"{folder}{scheme}/")
        assert str(entry.uri) == f"{folder}{scheme}/b.ckpt"
        assert load(entry.uri)["w"] == number
        assert asked.log
        assert other.log == []
    client = boto3.client(
        "s3",
        endpoint_url=two[1].environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="a",
        aws_secret_access_key="b",
        region_name="us-east-1",
    )
    two[1].server.log.clear()
    load(f"{scheme}://one-bucket/a.ckpt", transport_params={"client": client})
    assert two[1].server.log  # what is given comes first


def test_the_order_of_settings(settings: Path, monkeypatch) -> None:
    assert store_settings("b") == StoreSettings()
    write(
        settings, '[object-storage]\nendpoint_url = "http://a"\nregion = "r"\ntype = "s3"\n', 0o644
    )
    assert store_settings("b") == StoreSettings("http://a", region="r")
    secrets = settings.with_suffix(".secrets.toml")
    write(
        secrets,
        f'[object-storage]\naws_endpoint_url = "http://b"\n{KEYS}[object-storage."c*"]\nregion="q"\n',
    )
    assert store_settings("b") == StoreSettings("http://b", "AKIA", SECRET, "r")
    assert SECRET not in repr(store_settings("b"))
    monkeypatch.setenv("ANEMOI_SETTINGS_OBJECT_STORAGE__ENDPOINT_URL", "http://c")
    monkeypatch.setenv("ANEMOI_SETTINGS_OBJECT_STORAGE__SKIP_SIGNATURE", "true")
    assert store_settings("b") == StoreSettings("http://c", "AKIA", SECRET, "r", True)
    write(settings, '[object-storage."c*"]\nendpoint_url = "http://d"\n')
    assert store_settings("cc") == StoreSettings("http://d", region="q")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'[object-storage]\nsecret_access_key = "{SECRET}\n', r"no TOML \(at line 2"),
        ("\xff", "is no text"),
        (f'object-storage = "{SECRET}"', "is no table"),
        (f'[object-storage]\nsecret_key = "{SECRET}"', "secret_key in .* is no setting"),
        ("[object-storage.b]\nregion = 3", "region in .* is of type int; give a str"),
        (f'[object-storage]\nskip_signature = "{SECRET}"', "of type str; give a bool"),
        (f'[object-storage]\nsecret_access_key = "{SECRET}"', "one of access_key_id and"),
        ('[object-storage."b*"]\n[object-storage."*"]', "are both for the bucket b"),
    ],
)
def test_settings_that_are_wrong(settings: Path, text: str, said: str) -> None:
    write(settings, text)
    if text == "\xff":
        settings.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=said) as caught:
        load("s3://b/a.ckpt")
    assert str(settings) in str(caught.value)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_keys_that_others_can_read(settings: Path) -> None:
    write(settings, f"[object-storage]\n{KEYS}", 0o644)
    with pytest.raises(CheckpointError, match="chmod 600"):
        store_settings("b")


def test_settings_of_yaml(settings: Path, monkeypatch) -> None:
    """As anemoi-utils 0.5.14 reads them."""
    yaml = settings.with_suffix(".yaml")
    write(yaml, "datasets: {named: []}\n", 0o644)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "yaml", None)
        assert store_settings("b") == StoreSettings()
        write(yaml, "object-storage:\n  endpoint_url: http://a\n  region: r\n  'c*': {region: q}\n")
        with pytest.raises(MissingPackageError, match="pip install pyyaml"):
            store_settings("b")
    needs.package("yaml", "pip install pyyaml")
    assert store_settings("b") == StoreSettings("http://a", region="r")
    assert store_settings("cc") == StoreSettings(region="q")
    secrets = settings.with_suffix(".secrets.yaml")
    keys = f"  access_key_id: AKIA\n  secret_access_key: {SECRET}\n"
    write(secrets, f"object_storage:\n{keys}")
    assert store_settings("b") == StoreSettings("http://a", "AKIA", SECRET, "r")
    write(settings, '[object-storage]\nendpoint_url = "http://t"\n')  # instead of YAML's section
    assert store_settings("b") == StoreSettings("http://t", "AKIA", SECRET)
    secrets.chmod(0o644)
    with pytest.raises(CheckpointError, match="chmod 600"):
        store_settings("b")
    for text, said in ((f"object-storage: {{a: {SECRET}", r"no YAML \(at line"), ("\0", "no YAML")):
        write(secrets, text + " object-storage")
        with pytest.raises(CheckpointError, match=said) as caught:
            store_settings("b")
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    write(secrets, "- object-storage")
    assert store_settings("b") == StoreSettings("http://t")


@pytest.mark.parametrize("method", ["stat", "read_text"])
def test_a_file_that_cannot_be_read(settings: Path, monkeypatch, method: str) -> None:
    write(settings, "[object-storage]\n# " + method)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, method, refuse)
        with pytest.raises(CheckpointError, match=r"cannot be read .Permission denied"):
            store_settings("b")
