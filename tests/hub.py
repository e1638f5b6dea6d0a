"""A server that redirects as Hugging Face's hub does, and MLflow's own server."""

import contextlib
import hashlib
import json
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
        self.renamed: dict[str, str] = {}
        """New names of repositories, by old ones."""
        self.page = 1000
        """How many entries a listing gives at once."""

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

    def put(self, bucket: str, files: dict[str, bytes]) -> None:
        """Puts files into a bucket, `buckets/owner/name`, which has no commits."""
        self.commit(bucket, files, "")
        self.branches[bucket, ""] = ""
        for path, data in files.items():
            self.files[bucket, "", path] = data

    def answer(self, request: servers.Request, fault: servers.Fault) -> servers.Reply:
        kind = "(?:(?:datasets|spaces|kernels)/)?"
        match = (
            re.fullmatch("/api/(?:models/)?(buckets/[^/]+/[^/]+)/tree()(?:/(.+))?", request.path)
            or re.fullmatch(
                f"/api/(?:models/)?({kind}[^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", request.path
            )
            or re.fullmatch("/(buckets/[^/]+/[^/]+)/resolve()/(.+)", request.path)
            or re.fullmatch(f"/({kind}[^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path)
        )
        if match is None or request.method not in ("GET", "HEAD"):
            return servers.error_reply("http", 404)
        repo, revision, path = (urllib.parse.unquote(each or "") for each in match.groups())
        if repo in self.renamed:
            location = request.target.replace(match[1], self.renamed[repo])
            return servers.Reply(307, servers._headers({"Location": location}))
        token = self.private.get(repo)
        if token and request.headers["Authorization"] != f"Bearer {token}":
            return said(401, "RepoNotFound", "Repository not found")
        commit = self.branches.get((repo, revision), revision)
        if "/tree" in request.path:
            return self.tree(request, repo, commit, path)
        data = self.files.get((repo, commit, path))
        if data is None:
            return said(404, "EntryNotFound", "Entry not found")
        if path.endswith(".json"):  # no large file
            reply = servers.Reply(200, servers._headers({"ETag": '"of-git"'}), data)
        else:
            digest = hashlib.sha256(data).hexdigest()
            location = f"{self.cdn.url}/{digest}?X-Amz-Signature=5ec4e7"
            headers = {"Location": location, "ETag": '"of-git"', "X-Linked-Etag": f'"{digest}"'}
            reply = servers.Reply(302, servers._headers(headers))
        if commit:
            reply.headers["X-Repo-Commit"] = commit
        return reply

    def tree(self, request: servers.Request, repo: str, commit: str, folder: str) -> servers.Reply:
        """What is in a folder, a page of it."""
        query = dict(urllib.parse.parse_qsl(request.query))
        start = f"{folder}/" if folder else ""
        found: dict[str, Any] = {}
        for (of, at, path), data in sorted(self.files.items()):
            if (of, at) != (repo, commit) or not path.startswith(start):
                continue
            name, slash, _ = path[len(start) :].partition("/")
            if slash and query["recursive"] != "True":
                found[start + name] = {"type": "directory", "path": start + name}
                continue
            date = f"2026-01-{10 + len(found)}T10:00:00.000Z"
            time = {"lastCommit": {"date": date}} if commit else {"mtime": date}
            found[path] = {"type": "file", "path": path, "size": len(data), **time}
        if not found:
            return said(404, "EntryNotFound", f"{folder} does not exist on that revision")
        first = int(query.get("cursor", 0))
        body = json.dumps([*found.values()][first : first + self.page]).encode()
        reply = servers.Reply(200, servers._headers({"Content-Type": "application/json"}), body)
        if first + self.page < len(found):
            query["cursor"] = str(first + self.page)
            following = f"https://huggingface.co{request.path}?{urllib.parse.urlencode(query)}"
            reply.headers["Link"] = f'<{following}>; rel="next"'
        return reply


def said(status: int, code: str, message: str) -> servers.Reply:
    """An error in the hub's own words."""
    reply = servers.error_reply("http", status)
    reply.headers["X-Error-Code"], reply.headers["X-Error-Message"] = code, message
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
