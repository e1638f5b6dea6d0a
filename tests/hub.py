"""A server that redirects as Hugging Face's hub does, and MLflow's own server."""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import servers


class Hub(servers.Server):
    """Repositories: small files are given whole, as the hub does, large ones by a redirect.

    Where it redirects to is another server, and the URL is signed; the log of both is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cdn = servers.HTTPServer()
        self.files: dict[tuple[str, str, str], bytes] = {}
        """By repository, commit and path."""
        self.branches: dict[tuple[str, str], str] = {}
        """Commits, by repository and branch."""
        self.private: dict[str, str] = {}
        """Tokens, by repository."""

    def start(self) -> None:
        super().start()
        self.cdn.start()

    def stop(self) -> None:
        super().stop()
        self.cdn.stop()

    def close(self) -> None:
        super().close()
        self.cdn.close()

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Puts files, and only these, on a branch; gives the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode() + os.urandom(8)).hexdigest()
        for path, data in files.items():
            self.files[repo, commit, path] = data
            self.cdn.put(hashlib.sha256(data).hexdigest(), data)
        self.branches[repo, branch] = commit
        return commit

    def answer(self, request: servers.Request, fault: servers.Fault) -> servers.Reply:
        match = re.fullmatch(
            "/((?:(?:datasets|spaces)/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path
        )
        if match is None or request.method not in ("GET", "HEAD"):
            return servers.error_reply("http", 404)
        repo, revision, path = map(urllib.parse.unquote, match.groups())
        token = self.private.get(repo)
        if token and request.headers["Authorization"] != f"Bearer {token}":
            return servers.error_reply("http", 401)
        commit = self.branches.get((repo, revision), revision)
        data = self.files.get((repo, commit, path))
        if data is None:
            return servers.error_reply("http", 404)
        if path.endswith(".json"):  # no large file
            reply = servers.Reply(200, servers._headers({"ETag": '"of-git"'}), data)
        else:
            digest = hashlib.sha256(data).hexdigest()
            location = f"{self.cdn.url}/{digest}?X-Amz-Signature=5ec4e7"
            headers = {"Location": location, "ETag": '"of-git"', "X-Linked-Etag": f'"{digest}"'}
            reply = servers.Reply(302, servers._headers(headers))
        reply.headers["X-Repo-Commit"] = commit
        return reply


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.close()


@contextlib.contextmanager
def running_mlflow(folder: Path, *options: str, **environment: str) -> Iterator[str]:
    """MLflow's server, with its files in a folder; gives its URL."""
    port = servers.free_port()
    url = f"http://127.0.0.1:{port}"
    command: list[Any] = [sys.executable, "-m", "mlflow", "server", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        for _ in range(2400):  # its imports alone take ten seconds, and more on a busy machine
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if process.poll() is not None:
                raise servers.UnavailableError((folder / "log").read_text())
            time.sleep(0.1)
        else:
            raise servers.UnavailableError((folder / "log").read_text())
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait()
