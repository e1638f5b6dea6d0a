"""Files on Hugging Face's hub, over HTTP.

The hub's `resolve` URL redirects to where the file is stored, by a URL that is signed for a while;
X-Repo-Commit tells the commit. The environment is read as huggingface_hub's manual documents it
("Environment variables").
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from attrs import evolve, frozen

from _anemoi_ckpt.errors import CheckpointError, CheckpointNotFoundError, InvalidURIError, redact
from _anemoi_ckpt.places import (
    CHECKPOINTS,
    URI,
    Entry,
    Page,
    Params,
    Version,
    list_all,
    list_page,
    path_of,
    register_scheme,
    resolve,
)
from _anemoi_ckpt.places.explained import explain, explained
from _anemoi_ckpt.places.http import HTTPURI, request
from _anemoi_ckpt.variables import few

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class HFURI(HTTPURI):
    """A file on Hugging Face's hub: ``hf://owner/repo[@revision]/path/in/repo``.

    ``hf://datasets/owner/repo/…``, ``hf://spaces/…`` and ``hf://kernels/…`` are the hub's other
    kinds of repository, and ``hf://buckets/owner/bucket/path`` is a file in a bucket, which has no
    revisions. A repository or folder with one checkpoint in it stands for that.
    """

    repo: str
    path: str
    revision: str = "main"

    path_field: ClassVar[str] = "path"
    is_url: ClassVar[bool] = False
    conditional: ClassVar[bool] = False  # the hub and the store that it redirects to have two ETags
    extra: ClassVar[str | None] = None
    credentials: ClassVar[str] = (
        "set HF_TOKEN (or run `hf auth login`), ask for access on its page if it is gated, and "
        "check the name: the hub says the same of a repository that is not there"
    )

    @property
    def url(self) -> str:
        """The hub's `resolve` URL."""
        path = urllib.parse.quote(self.path)
        if self.is_bucket:
            return f"{_hub_endpoint()}/{self.repo}/resolve/{path}"
        revision = urllib.parse.quote(self.revision, safe="")
        return f"{_hub_endpoint()}/{self.repo}/resolve/{revision}/{path}"

    @property
    def filename(self) -> str:
        """The last part of its path, of a folder's, too."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def is_bucket(self) -> bool:
        """Whether it is in a bucket, and not in a repository."""
        return self.repo.startswith("buckets/")

    @property
    def headers(self) -> Mapping[str, str]:
        """The hub's token. requests drops it where the hub redirects to another host."""
        token = _hub_token()
        return {"Authorization": f"Bearer {token}"} if token else {}


@frozen
class _Tree(HFURI):
    """A request for what is in a folder, under the name that the user gave."""

    token: str | None = None  # the next part's path and query
    recursive: bool = False

    @property
    def url(self) -> str:
        """The URL of the hub's API, "tree"."""
        if self.token:  # at the hub that was asked, if the token goes there
            return f"{_hub_endpoint()}{self.token}"
        kind = "" if self.repo.startswith(_KINDS) else "models/"
        folder = urllib.parse.quote(self.path.rpartition("/")[0], safe="")
        revision = "" if self.is_bucket else "/" + urllib.parse.quote(self.revision, safe="")
        query = urllib.parse.urlencode({"recursive": self.recursive, "expand": True})
        tree = f"{kind}{self.repo}/tree{revision}{'/' * bool(folder)}{folder}"
        return f"{_hub_endpoint()}/api/{tree}?{query}"


# ── parse ─────────────────────────────────────────────────────────────────────────────────────

_KINDS = ("datasets/", "spaces/", "kernels/", "buckets/")
_HUB = re.compile(
    r"(?i:hf)://(?:models/)?((?:(?:datasets|spaces|kernels)/)?[^/@]+/[^/@]+)"
    r"(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.*))?",
    re.DOTALL,
)
_BUCKET = re.compile(r"(?i:hf)://(buckets/[^/@]+/[^/@]+)()(?:/(.*))?", re.DOTALL)


def parse_hub(text: str) -> URI:
    """Parse ``hf://owner/repo[@revision]/path/in/repo`` or ``hf://buckets/owner/bucket/path``.

    Raises:
        InvalidURIError: it names no repository and no bucket.
    """
    is_bucket = text[5:].startswith("buckets/")
    match = (_BUCKET if is_bucket else _HUB).fullmatch(text)
    if match is None or f"{match[1].rpartition('/')[0]}/" in _KINDS:
        raise InvalidURIError(
            text,
            "names no repository",
            "write hf://owner/repo[@revision]/path/in/repo, or hf://buckets/owner/bucket/path",
        )
    revision = "" if is_bucket else urllib.parse.unquote(match[2] or "main")
    return HFURI(text, match[1], match[3] or "", revision)


register_scheme("hf", parse_hub)


# ── client ────────────────────────────────────────────────────────────────────────────────────


def _hub_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _hub_token() -> str:
    """Read the token as huggingface_hub does: from the environment, or from its login's file."""
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return ""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if token:
        return token.strip()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    return path.read_text("utf-8").strip() if path.is_file() else ""


@explain.register
def explain_hub_error(uri: HFURI, err: Exception, pin: Version | None = None) -> CheckpointError:
    """Make a `CheckpointError` of an answer: the hub says more in a header than in the status."""
    found = explain.dispatch(URI)(uri, err, pin)
    headers = getattr(getattr(err, "response", None), "headers", {})
    if message := headers.get("X-Error-Message"):
        found.problem = redact(f"{found.problem.removesuffix(')')}: {message})")
        found.name_place(uri)
    return found


# ── resolve ───────────────────────────────────────────────────────────────────────────────────

_COMMIT = re.compile("[0-9a-f]{40}")
_FILE = re.compile(r"\.\w*[a-zA-Z]\w*$")  # how a file's name ends, and a folder's does not
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")  # a part of what an index names
_RESOLVE = re.compile(r"/((?:(?:datasets|spaces|kernels|buckets)/)?[^/]+/[^/]+)/resolve/.*")
_RENAMES = 5  # of a repository, at most


@resolve.register
def resolve_hub(uri: HFURI, transport_params: Params = None) -> URI:
    """Ask which commit a branch or tag is, and which checkpoint is in a repository or folder.

    All reads are of that commit.

    Raises:
        InvalidURIError: it is a folder with several checkpoints; the error names them.
        CheckpointNotFoundError: there is no such file; or it is a folder without checkpoints.
    """
    if not uri.path or uri.path.endswith("/"):
        return _only_checkpoint(uri, uri.path, transport_params)
    is_file = _FILE.search(uri.path)
    if is_file and (uri.is_bucket or _COMMIT.fullmatch(uri.revision)):
        return uri
    try:
        return _pinned(uri, transport_params)
    except CheckpointNotFoundError as err:
        if is_file:
            raise
        problem = err
    with suppress(CheckpointNotFoundError):
        return _only_checkpoint(uri, f"{uri.path}/", transport_params)
    raise problem


def _pinned(uri: HFURI, params: Params) -> HFURI:
    """Name the commit, and the repository as it is called now."""
    for _ in range(_RENAMES):
        with explained(uri), request("HEAD", uri, params) as response:
            response.raise_for_status()
        location = response.headers.get("Location", "").removeprefix(_hub_endpoint())
        renamed = _RESOLVE.fullmatch(location)
        if renamed is None or renamed[1] == uri.repo:
            break
        uri = evolve(uri, repo=renamed[1])
    return evolve(uri, revision=response.headers.get("X-Repo-Commit") or uri.revision)


def _only_checkpoint(uri: HFURI, folder: str, params: Params) -> URI:
    """Name the checkpoint that a folder has; of one in parts, its index."""
    entries = list_all(evolve(uri, path=folder), params)
    names = [path_of(each.uri)[len(folder) :] for each in entries]
    endings = (*CHECKPOINTS, ".index.json")
    found = [each for each in names if each.endswith(endings) and not _SHARD.search(each)]
    if not found:
        problem = "there is no checkpoint in this folder"
        raise CheckpointNotFoundError(uri, problem, f"in it: {few(names)}")
    if len(found) > 1:
        problem = "there are several checkpoints in this folder"
        raise InvalidURIError(uri, problem, f"name one of them: {few(found)}")
    return _pinned(evolve(uri, path=folder + found[0]), params)


# ── list ──────────────────────────────────────────────────────────────────────────────────────


@list_page.register
def list_hub_page(
    uri: HFURI,
    token: str | None = None,
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List with the hub's API, "tree": of a repository with the times of the last commits."""
    tree = _Tree(uri.text, uri.repo, uri.path, uri.revision, token, recursive)
    with explained(uri), request("GET", tree, transport_params) as response:
        response.raise_for_status()
        items = response.json()
        following = response.links.get("next", {}).get("url", "")
    beneath = [each for each in items if each["path"].startswith(uri.path)]
    return Page(
        [_entry(uri, each) for each in beneath], following[following.find("/api/") :] or None
    )


def _entry(uri: HFURI, item: Mapping[str, Any]) -> Entry:
    if item["type"] != "file":
        return Entry.beneath(uri, f"{item['path']}/")
    told = (item.get("lastCommit") or {}).get("date") or item.get("mtime") or item.get("uploadedAt")
    modified = datetime.fromisoformat(told) if told else None
    return Entry.beneath(uri, item["path"], item["size"], modified)
