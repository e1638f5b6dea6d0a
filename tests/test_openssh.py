"""OpenSSH's own sshd, as users reach it: with keys and known hosts as `ssh` has them.

What goes wrong on the way is tried with a server that can be told to (test_sftp.py).
"""

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import needs
import servers
from anemoi_ckpt import (
    AccessDeniedError,
    ChangedError,
    CheckpointNotFoundError,
    InvalidURIError,
    UnreachableError,
    download,
    find,
    latest,
    load,
    peek,
    remove_object,
    save,
)
from checkpoints import as_bytes, assert_same
from strategies import weights

needs.package("paramiko", "pip install paramiko")
PROGRAM = needs.program("sshd", "apt-get install openssh-server")
CHECKPOINT = {
    "state_dict": {"weight": torch.rand(1000, 1000), "bias": torch.rand(1000)},
    "optimizer_states": [torch.rand(3_000_000)],
    "epoch": 3,
}
DATA = as_bytes(CHECKPOINT)
SETTINGS = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/users_key.pub
PidFile none
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
Subsystem sftp internal-sftp
"""


@attrs.frozen
class Host:
    folder: Path
    port: int

    def uri(self, path: str) -> str:
        return f"sftp://{getpass.getuser()}@127.0.0.1:{self.port}{self.folder}/{path}"


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """An sshd of this test's own, which lets one key in, whose own key is in a file."""
    folder = tmp_path_factory.mktemp("openssh")
    for name in ("host_key", "users_key"):
        making = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(making, check=True)
    port = servers.free_port()
    (folder / "sshd_config").write_text(SETTINGS.format(port=port, folder=folder))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it separates its privileges
    command = [PROGRAM, "-D", "-e", "-f", str(folder / "sshd_config")]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            host = Host(folder, port)
            deadline = time.monotonic() + 30
            while "Server listening" not in (folder / "log").read_text():
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield host
        finally:
            process.terminate()


@pytest.fixture
def host(sshd: Host) -> Host:
    """A host that is known here, and lets us in, with a checkpoint in `run/last.ckpt`."""
    home = Path.home() / ".ssh"
    home.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(sshd.folder / "users_key", home / "id_ed25519")
    kind, key = (sshd.folder / "host_key.pub").read_text().split()[:2]
    (home / "known_hosts").write_text(
        f"[127.0.0.1]:{sshd.port},[localhost]:{sshd.port} {kind} {key}\n"
    )
    shutil.rmtree(sshd.folder / "run", ignore_errors=True)
    (sshd.folder / "run").mkdir()
    (sshd.folder / "run/last.ckpt").write_bytes(DATA)
    return sshd


def test_what_one_does_with_a_checkpoint(host: Host, tmp_path: Path) -> None:
    uri = host.uri("run/last.ckpt")
    assert_same(load(uri), CHECKPOINT)
    assert_same(load(uri, weights), CHECKPOINT["state_dict"])
    assert peek(uri).epoch == 3
    assert download(uri, tmp_path / "a.ckpt").read_bytes() == DATA


def test_many_loads_at_once_are_few_sessions(host: Host) -> None:
    uri = host.uri("run/last.ckpt")
    with ThreadPoolExecutor(6) as pool:  # sshd allows ten sessions of a connection
        for result in pool.map(lambda _: load(uri, weights), range(6)):
            assert_same(result, CHECKPOINT["state_dict"])


def test_a_checkpoint_is_saved_listed_and_removed(host: Host) -> None:
    first = host.uri("run/new.ckpt")
    for uri in (first, host.uri("run/a%20b%25.ckpt")):
        save(CHECKPOINT, uri)
        assert_same(load(uri), CHECKPOINT)
    save({"epoch": 4}, first)
    assert load(first) == {"epoch": 4}
    names = [Path(each.name).name for each in (host.folder / "run").iterdir()]
    assert sorted(names) == ["a b%.ckpt", "last.ckpt", "new.ckpt"]  # and nothing else is left
    assert len(find(host.uri("run/*.ckpt"))) == 3
    os.utime(host.folder / "run/last.ckpt", (2e9, 2e9))
    assert str(latest(host.uri("run/"))).endswith("/last.ckpt")
    remove_object(first)
    assert not (host.folder / "run/new.ckpt").exists()


def test_what_is_not_there_or_no_file(host: Host) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"is it .*last\.ckpt"):
        load(host.uri("run/lasst.ckpt"))
    with pytest.raises(InvalidURIError, match="this is a folder"):
        load(host.uri("run"))


def test_who_is_not_let_in(host: Host) -> None:
    (Path.home() / ".ssh/id_ed25519").unlink()
    with pytest.raises(AccessDeniedError):
        load(host.uri("run/last.ckpt").replace("127.0.0.1", "localhost"), retries=0)


def test_a_key_that_is_not_the_hosts(host: Host) -> None:
    known = Path.home() / ".ssh/known_hosts"
    other = (host.folder / "users_key.pub").read_text().split()[:2]
    known.write_text(f"[127.0.0.1]:{host.port} {' '.join(other)}\n")
    with pytest.raises(
        UnreachableError, match="the host has another key than the one that is known"
    ):
        load(host.uri("run/last.ckpt"))


def test_a_file_that_is_replaced_while_it_is_read(host: Host) -> None:
    uri, path = host.uri("run/last.ckpt"), host.folder / "run/last.ckpt"

    def replace(checkpoint: Any) -> Any:
        path.unlink()
        path.write_bytes(as_bytes({**CHECKPOINT, "more": torch.ones(9)}))
        return checkpoint

    with pytest.raises(ChangedError):
        load(uri, replace)


def test_a_host_that_is_not_there(host: Host) -> None:
    uri = host.uri("run/last.ckpt").replace(f":{host.port}", f":{servers.free_port()}")
    with pytest.raises(UnreachableError):
        load(uri, retries=0)
