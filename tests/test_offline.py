"""Offline, the cached copy of this very object serves, if it is sound, and nobody is asked."""

import json
import logging

import pytest
import torch

import _anemoi_ckpt.cache
from anemoi_ckpt import UnreachableError, download, load, main
from checkpoints import as_bytes

DATA = as_bytes({"w": torch.arange(300_000)})
BRIEF = {"retries": 0, "timeout": 0.5}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ANEMOI_CKPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANEMOI_CKPT_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.parametrize("name", ["ANEMOI_CKPT_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "True", "yes", "ON"])
def test_a_copy_serves_and_nobody_is_asked(http_server, monkeypatch, caplog, name, value) -> None:
    uri = http_server.put("a.ckpt", as_bytes({"w": torch.zeros(3)}))
    load(uri, cached=True)
    http_server.put("a.ckpt", DATA)
    load(uri, cached=True)
    load(uri, cached=True)
    http_server.log.clear()
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(load(uri, cached=True)["w"], torch.arange(300_000))
    assert http_server.log == []
    assert "offline, so the copy" in caplog.text


def test_without_the_variable_the_error_advises_it(http_server, monkeypatch) -> None:
    uri = http_server.put("a.ckpt", DATA)
    path = download(uri)
    http_server.stop()
    monkeypatch.setenv("ANEMOI_CKPT_OFFLINE", "0")
    with pytest.raises(UnreachableError, match="set ANEMOI_CKPT_OFFLINE=1 to take the copy"):
        load(uri, cached=True, **BRIEF)
    monkeypatch.setenv("ANEMOI_CKPT_OFFLINE", "1")
    assert download(uri) == path
    for other in (f"{uri}?versionId=3", uri.replace("a.ckpt", "b.ckpt")):
        with pytest.raises(UnreachableError) as caught:
            load(other, cached=True, **BRIEF)
        assert "OFFLINE" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere")
    with pytest.raises(UnreachableError):
        load(uri, cached=True, **BRIEF)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "record"])
def test_a_damaged_copy_does_not_serve(http_server, monkeypatch, harm) -> None:
    uri = http_server.put("a.ckpt", DATA)
    path = download(uri)
    wrong = bytearray(DATA)
    wrong[len(wrong) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    elif harm == "record":
        (path.parent / _anemoi_ckpt.cache._RECORD).write_text("{")
    else:
        path.write_bytes(wrong if harm == "flip" else DATA[:-1])
    http_server.stop()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnreachableError):
        load(uri, cached=True, **BRIEF)


def test_buckets_of_one_name_at_two_stores(s3_store, tmp_path, monkeypatch) -> None:
    for name, value in s3_store.environment.items():
        monkeypatch.setenv(name, value)
    s3_store.write("off.ckpt", DATA)
    uri = s3_store.uri("off.ckpt")
    load(uri, cached=True)
    monkeypatch.setenv("ANEMOI_CKPT_OFFLINE", "1")
    assert torch.equal(load(uri, cached=True)["w"], torch.arange(300_000))
    settings = tmp_path / "settings.toml"
    settings.write_text('[object-storage]\nendpoint_url = "http://127.0.0.1:1"\n')
    monkeypatch.setenv("ANEMOI_SETTINGS_FILE", str(settings))
    with pytest.raises(UnreachableError):
        load(uri, cached=True, **BRIEF)


def test_the_command_tells_what_can_serve(http_server, capsys) -> None:
    path = download(http_server.put("a.ckpt", DATA))
    main(["cache", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["offline"] is True
    (path.parent / _anemoi_ckpt.cache._RECORD).unlink()
    main(["cache"])
    assert "(not for offline)" in capsys.readouterr().out
