"""Digest authentication (RFC 7616), with the credentials that basic authentication takes."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

import servers
from anemoi_ckpt import AccessDeniedError, download, load, peek
from checkpoints import as_bytes
from servers import Fault, Request

DATA = as_bytes({"w": torch.arange(100_000), "epoch": 3})
NONCE = "dcd98b7102dd2f0e8b11d0f600bfb0c093"
CHALLENGE = {"WWW-Authenticate": f'Digest realm="a b", nonce="{NONCE}", qop="auth"'}


def md5(*texts: str) -> str:
    return hashlib.md5(":".join(texts).encode(), usedforsecurity=False).hexdigest()


def is_answered(request: Request, user: str, password: str) -> bool:
    """Compute what a client must send (RFC 7616 3.4.1)."""
    sent = dict(re.findall(r'(\w+)="?([^",]+)"?', request.headers["Authorization"] or ""))
    if "response" not in sent:
        return False
    who, what = md5(user, "a b", password), md5(request.method, request.target)
    return sent["response"] == md5(who, NONCE, sent["nc"], sent["cnonce"], "auth", what)


@pytest.fixture
def url(http_server: servers.HTTPServer) -> str:
    http_server.fault = lambda request: (
        None if is_answered(request, "me", "1 2") else Fault(status=401, headers=CHALLENGE)
    )
    return http_server.put("a.ckpt", DATA)


def in_url(url: str) -> str:
    return url.replace("http://", "http://me:1%202@")


def test_the_credentials_of_a_url(
    url: str, http_server: servers.HTTPServer, tmp_path: Path
) -> None:
    assert load(in_url(url))["epoch"] == 3
    assert peek(in_url(url)).epoch == 3
    assert download(in_url(url), tmp_path).read_bytes() == DATA
    statuses = [request.status for request in http_server.log]
    # A thread learns once what the server wants
    assert statuses.count(401) <= statuses.count(206)
    with pytest.raises(AccessDeniedError) as caught:
        load(in_url(url).replace("1%202", "hunter2"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("how", ["params", "netrc", "session"])
def test_other_credentials(
    url: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params: dict[str, Any] = {}
    if how == "params":
        params = {"user": "me", "password": "1 2"}
    elif how == "netrc":
        netrc = tmp_path / "netrc"
        netrc.write_text('machine 127.0.0.1 login me password "1 2"')
        monkeypatch.setenv("NETRC", str(netrc))
    else:
        params = {"session": requests.Session()}
        params["session"].auth = requests.auth.HTTPDigestAuth("me", "1 2")
    assert load(url, transport_params=params)["epoch"] == 3


def test_who_is_redirected_to_gets_no_credentials(http_server: servers.HTTPServer) -> None:
    other = servers.HTTPServer()
    other.start()
    try:
        other.fault = lambda request: Fault(status=401, headers=CHALLENGE)
        http_server.fault = lambda request: servers.redirect(f"{other.url}/a.ckpt")
        with pytest.raises(AccessDeniedError):
            load(f"http://me:1@127.0.0.1:{http_server.port}/a.ckpt")
        assert other.log
        assert not any(request.headers["Authorization"] for request in other.log)
    finally:
        other.stop()
