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

import _anemoi_ckpt.places.azure
import _anemoi_ckpt.transport
import needs
import servers
from _anemoi_ckpt.places.settings import AZURE, StoreSettings, store_settings
from anemoi_ckpt import (
    AccessDeniedError,
    CheckpointError,
    MissingPackageError,
    UnreachableError,
    list_objects,
    load,
    parse_uri,
    save,
)
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
        ('[object-storage]\nendpoint_url = "b:9000"', "bucket b has no scheme; write https://"),
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


# ── Azure ─────────────────────────────────────────────────────────────────────────────────────

KEY = "c2VjcmV0"
OWN = f'account_name = "acc"\naccount_key = "{KEY}"\n'
BLOBS = "blob.core.windows.net"


@pytest.mark.parametrize(
    ("text", "section", "url", "credential"),
    [
        ("az://c/b", f"[object-storage]\n{OWN}", f"https://acc.{BLOBS}/", "acc"),
        (
            "az://c/b",
            f'[object-storage."c*"]\nendpoint_url = "http://127.0.0.1:1/acc"\n{OWN}',
            "http://127.0.0.1:1/acc/",
            "acc",
        ),
        (
            "abfs://c/b",
            '[object-storage]\naccount_name = "acc"\nsas_token = "?sv=1&sig=s"\n',
            f"https://acc.{BLOBS}/?sv=1&sig=s",
            None,
        ),
        (
            f"https://acc.{BLOBS}/c/b?sv=2&sig=t",
            f"[object-storage]\n{OWN}",
            f"https://acc.{BLOBS}/?sv=2&sig=t",
            None,
        ),
        (
            "az://c/b",
            '[object-storage.c]\naccount_name = "acc"\nskip_signature = true\n',
            f"https://acc.{BLOBS}/",
            None,
        ),
        (  # of the URL's account
            "abfss://c@acc.dfs.core.windows.net/b",
            f'[object-storage.c]\naccount_key = "{KEY}"\n',
            f"https://acc.{BLOBS}/",
            "acc",
        ),
        (  # the environment says which account, or has its key
            "az://c/b",
            f'[object-storage.c]\naccount_key = "{KEY}"\n',
            f"https://env.{BLOBS}/",
            "env",
        ),
        (
            "az://c/b",
            '[object-storage.c]\naccount_name = "env"\n',
            f"https://env.{BLOBS}/",
            "env",
        ),
        (  # another account's credentials are not shown to this one, nor to a server of no account
            f"https://other.{BLOBS}/c/b",
            f"[object-storage]\n{OWN}",
            f"https://other.{BLOBS}/",
            None,
        ),
        (
            "abfss://c@evil.example/b",
            f'[object-storage.c]\naccount_key = "{KEY}"\n',
            "https://evil.example/",
            None,
        ),
        (  # these are S3's
            "az://c/b",
            f'[object-storage]\nendpoint_url = "http://a"\n{KEYS}',
            f"https://env.{BLOBS}/",
            "env",
        ),
        (
            "az://c/b",
            '[object-storage]\nendpoint_url = "http://a"\n',
            f"https://env.{BLOBS}/",
            "env",
        ),
    ],
)
def test_the_settings_of_azure(  # noqa: PLR0913, PLR0917 - fixtures
    settings: Path, monkeypatch, text, section, url, credential
) -> None:
    needs.package("azure.storage.blob", "pip install azure-storage-blob")
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "env")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    write(settings, section)
    client = _anemoi_ckpt.places.azure.client_of(parse_uri(text), None)
    assert client.url == url
    assert getattr(client.credential, "account_name", None) == credential


def test_settings_come_before_the_connection_string(azure, settings: Path, monkeypatch) -> None:
    """A container's section names another server than the environment does."""
    azure.write("told/a.ckpt", as_bytes({"w": torch.ones(3)}))
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING", servers.azurite_connection_string("http://127.0.0.1:1")
    )
    account, key = servers._AZURITE_ACCOUNT, servers._AZURITE_KEY
    write(
        settings,
        f'[object-storage."check*"]\nendpoint_url = "{azure.server.url}/{account}"\n'
        f'account_name = "{account}"\naccount_key = "{key}"\n',
    )
    uri = azure.uri("told/a.ckpt")
    assert load(uri, cached=True)["w"].tolist() == [1] * 3
    assert [each.uri.filename for each in list_objects(azure.uri("told"))] == ["a.ckpt"]
    assert key not in repr(store_settings("checkpoints", AZURE))
    monkeypatch.setenv("ANEMOI_CKPT_OFFLINE", "1")
    azure.server.reset()
    assert load(uri, cached=True)["w"].tolist() == [1] * 3
    assert azure.server.log == []
    write(settings, "")  # it was another store's
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    with pytest.raises(UnreachableError):
        load(uri, cached=True, timeout=1)


def test_settings_of_the_other_store_are_not_s3s(settings: Path) -> None:
    write(settings, f'[object-storage]\nendpoint_url = "http://a"\n{OWN}')
    assert store_settings("b") == StoreSettings()
    told = StoreSettings("http://a", account_name="acc", account_key=KEY)
    assert store_settings("b", AZURE) == told
    write(settings, '[object-storage.b]\nendpoint_url = "http://a"\n')
    assert store_settings("b") == store_settings("b", AZURE) == StoreSettings("http://a")


def test_a_key_without_an_account(settings: Path, monkeypatch) -> None:
    write(settings, f'[object-storage]\naccount_key = "{KEY}"\n')
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    with pytest.raises(AccessDeniedError, match="no storage account is named"):
        load("az://c/b")
