"""Connections to SSH servers, through paramiko: one for each login, with a few channels of SFTP.

~/.ssh/config, the agent and the keys in ~/.ssh are used as `ssh` uses them (ssh_config(5)). A host
whose key is not in known_hosts is refused, unless ~/.ssh/config has `StrictHostKeyChecking no` or
`accept-new` for it: there is nobody to ask.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import hashlib
import logging
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import field, frozen

from _anemoi_ckpt.places.interrupts import Stop, connect_socket, heeded, register

CHANNELS = 8  # at once on a connection: sshd allows ten (MaxSessions)
_PORT = 22
_POLL_SECONDS = 0.1  # between two looks at a stop, where a thread waits for others
_ACCEPTING = {"no", "off", "accept-new"}  # values of StrictHostKeyChecking
_KNOWN_HOSTS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
_ALL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"

# What paramiko logs as an error is raised, too; without a handler it would be on the screen twice.
_LOG = "anemoi_ckpt.ssh"
logging.getLogger(_LOG).setLevel(logging.CRITICAL)


class UnknownHostKeyError(Exception):
    """No file of known hosts has the key of a host."""


@frozen
class Login:
    """Who connects to where, as the URI and the caller have it."""

    host: str
    port: int | None
    user: str | None
    password: str | None = field(repr=False)
    options: Mapping[str, Any] = field(factory=dict, repr=False, eq=repr)  # `SSHClient.connect`'s


@frozen
class _Target:
    """Where to connect, and with what: as a login and ~/.ssh/config have it together."""

    host: str
    port: int
    options: Mapping[str, Any] = field(repr=False)  # for `SSHClient.connect`
    proxy: str | None  # a command that speaks for the host
    known_hosts: tuple[Path, ...]
    accepts_unknown: bool


def _target(login: Login, paramiko: Any) -> _Target:
    path = Path("~/.ssh/config").expanduser()
    config = paramiko.SSHConfig.from_path(str(path)) if path.is_file() else paramiko.SSHConfig()
    told = config.lookup(login.host)
    host, port = told["hostname"], login.port or int(told.get("port", _PORT))
    keys = [Path(each).expanduser() for each in told.get("identityfile", ())]
    others = not login.password and told.get("identitiesonly") != "yes"
    options = {
        "username": login.user or told.get("user") or getpass.getuser(),
        "password": login.password,
        "key_filename": [str(each) for each in keys if each.is_file() and not login.password],
        "allow_agent": others,
        "look_for_keys": others,
        "compress": told.get("compression") == "yes",
        **login.options,
    }
    known = told.get("userknownhostsfile", _KNOWN_HOSTS)
    known = f"{known} {told.get('globalknownhostsfile', _ALL_KNOWN_HOSTS)}"
    return _Target(
        host,
        port,
        options,
        _proxy(told, host, port),
        tuple(Path(each).expanduser() for each in shlex.split(known)),
        told.get("stricthostkeychecking") in _ACCEPTING,
    )


def _proxy(told: Mapping[str, Any], host: str, port: int) -> str | None:
    """Give the command that ProxyCommand names, or that OpenSSH makes of ProxyJump."""
    command, jump = told.get("proxycommand"), told.get("proxyjump")
    if command is None and jump not in {None, "none"}:
        *first, last = str(jump).split(",")
        way = ["-J", ",".join(first)] if first else []
        command = shlex.join(["ssh", *way, "-W", f"[{host}]:{port}", "--", last])
    return command if command != "none" else None


# ── host keys ─────────────────────────────────────────────────────────────────────────────────


class _Policy:
    """What paramiko asks about a host whose key it does not know."""

    def __init__(self, target: _Target) -> None:
        self._target = target

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:  # noqa: ARG002 - paramiko's
        if not self._target.accepts_unknown:
            digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
            raise UnknownHostKeyError(f"{hostname} has the {key.get_name()} key SHA256:{digest}")


# ── server ────────────────────────────────────────────────────────────────────────────────────


class Server:
    """A connection to a server, made when it is needed, and the channels on it."""

    def __init__(self, login: Login, paramiko: Any) -> None:
        """Take the login; nothing is sent yet."""
        self._login, self._paramiko = login, paramiko
        self._room = threading.BoundedSemaphore(CHANNELS)
        self._connecting = threading.Lock()
        self._client: Any = None
        self._free: list[Any] = []  # channels of the client that nobody uses

    def connect(self, timeout: float) -> Any:
        """Give paramiko's transport: the one that there is, or a new one."""
        with _acquired(self._connecting):
            transport = self._client.get_transport() if self._client else None
            if transport is None or not transport.is_active():
                self.close()
                self._client = _connected(self._login, self._paramiko, timeout)
                transport = self._client.get_transport()
        return transport

    @contextmanager
    def channel(self, timeout: float) -> Iterator[Any]:
        """Give paramiko's `SFTPClient`, which no other thread uses meanwhile.

        It is used again, unless the block fails: then an answer may still be on its way.
        """
        with _acquired(self._room):
            sftp = self._channel(timeout)
            try:
                yield sftp
            except BaseException:
                sftp.close()
                raise
            self._free.append(sftp)

    def _channel(self, timeout: float) -> Any:
        transport = self.connect(timeout)
        if isinstance(transport.sock, socket.socket):  # or one of the caller's own
            register(transport.sock)
        while self._free:
            sftp = self._free.pop()
            if sftp.get_channel().get_transport() is transport and not sftp.get_channel().closed:
                break
            sftp.close()
        else:
            with _limited(transport, timeout):
                channel = transport.open_session(timeout=timeout)
                channel.settimeout(timeout)
                channel.invoke_subsystem("sftp")
                sftp = self._paramiko.SFTPClient(channel)
        sftp.get_channel().settimeout(timeout)
        return sftp

    def close(self) -> None:
        """End the connection. The next use of this server makes another."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


@contextmanager
def _limited(transport: Any, seconds: float) -> Iterator[None]:
    """Close a transport if the block takes longer: paramiko waits for some answers without end."""
    timer = threading.Timer(seconds, transport.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _acquired(lock: Any) -> Iterator[None]:
    """Hold a lock in the block, and heed a stop while it is waited for."""
    while not lock.acquire(timeout=_POLL_SECONDS):
        (heeded() or Stop()).check()
    try:
        yield
    finally:
        lock.release()


def _connected(login: Login, paramiko: Any, timeout: float) -> Any:
    """Connect, check the host's key, and log in."""
    target = _target(login, paramiko)
    client = paramiko.SSHClient()
    client.set_log_channel(_LOG)
    for path in target.known_hosts:
        if path.is_file():
            client.load_system_host_keys(str(path))
    client.set_missing_host_key_policy(_Policy(target))
    waits = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout", "channel_timeout"), timeout)
    sock = target.options.get("sock") or _socket(target, timeout)
    with contextlib.ExitStack() as stack:
        stack.callback(client.close)
        stack.callback(sock.close)
        client.connect(target.host, target.port, **{**waits, **target.options, "sock": sock})
        stack.pop_all()
    return client


def _socket(target: _Target, timeout: float) -> socket.socket:
    if target.proxy:
        made = _proxied(target.proxy)
    else:
        made = connect_socket(target.host, target.port, timeout)
    try:
        register(made)
    except OSError:
        made.close()
        raise
    return made


def _proxied(command: str) -> socket.socket:
    """Start a command, and give a socket that is its input and output."""
    ours, theirs = socket.socketpair()
    with theirs:
        end = theirs.fileno()
        process = subprocess.Popen(shlex.split(command), stdin=end, stdout=end)  # noqa: S603 - the user's own
    threading.Thread(target=process.wait, daemon=True).start()  # it ends when the socket is closed
    return ours
