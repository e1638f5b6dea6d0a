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
from pathlib import Path
from typing import ClassVar

from attrs import evolve, frozen

from _anemoi_ckpt.errors import InvalidURIError
from _anemoi_ckpt.places import URI, Params, register_scheme, resolve
from _anemoi_ckpt.places.explained import explained
from _anemoi_ckpt.places.http import HTTPURI, request

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class HFURI(HTTPURI):
    """A file on Hugging Face's hub: ``hf://owner/repo[@revision]/path/in/repo``.

    ``hf://datasets/owner/repo/…`` and ``hf://spaces/owner/repo/…`` are the hub's other kinds.
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
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        revision = urllib.parse.quote(self.revision, safe="")
        path = urllib.parse.quote(self.path)
        return f"{endpoint.rstrip('/')}/{self.repo}/resolve/{revision}/{path}"

    @property
    def headers(self) -> Mapping[str, str]:
        """The hub's token. requests drops it where the hub redirects to another host."""
        token = _hub_token()
        return {"Authorization": f"Bearer {token}"} if token else {}


# ── parse ─────────────────────────────────────────────────────────────────────────────────────

_HUB = re.compile(
    r"(?i:hf)://((?:datasets/|spaces/)?[^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?/(.*[^/])"
)


def parse_hub(text: str) -> URI:
    """Parse ``hf://owner/repo[@revision]/path/in/repo``.

    Raises:
        InvalidURIError: it names no file of a repository.
    """
    match = _HUB.fullmatch(text)
    if match is None:
        raise InvalidURIError(
            text, "names no file of a repository", "write hf://owner/repo[@revision]/path/in/repo"
        )
    return HFURI(text, match[1], match[3], urllib.parse.unquote(match[2] or "main"))


register_scheme("hf", parse_hub)


# ── client ────────────────────────────────────────────────────────────────────────────────────


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


# ── resolve ───────────────────────────────────────────────────────────────────────────────────


@resolve.register
def resolve_hub(uri: HFURI, transport_params: Params = None) -> URI:
    """Ask which commit a branch or tag is, so that all reads are of one commit."""
    if re.fullmatch("[0-9a-f]{40}", uri.revision):
        return uri
    with explained(uri), request("HEAD", uri, transport_params) as response:
        response.raise_for_status()
        commit = response.headers.get("X-Repo-Commit")
    return evolve(uri, revision=commit or uri.revision)
