"""Places that say where a file really is: Hugging Face's hub, and MLflow.

Hugging Face · MLflow
"""

from __future__ import annotations

import base64
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from attrs import evolve, field, frozen

from _ckpt_errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    UnreachableError,
)
from _ckpt_places import (
    HTTPURI,
    URI,
    Params,
    explained,
    http_request,
    imported,
    open_stream,
    parse_uri,
    register_scheme,
    resolve,
    without_secrets,
)

# ── Hugging Face ──────────────────────────────────────────────────────────────────────────────
#
# The hub's `resolve` URL redirects to wherever the file is stored, by a URL that is signed for a
# while; X-Repo-Commit tells the commit. The environment is read as huggingface_hub's manual has it
# ("Environment variables").


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
    conditional: ClassVar[bool] = False  # the hub may compare what it redirects to with its own
    extra: ClassVar[str | None] = None
    credentials: ClassVar[str] = (
        "set HF_TOKEN (or run `hf auth login`), ask for access on its page if it is gated, and "
        "check the name: the hub says the same of a repository that is not there"
    )

    @property
    def url(self) -> str:
        """Where the hub tells where it is."""
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        revision = urllib.parse.quote(self.revision, safe="")
        path = urllib.parse.quote(self.path)
        return f"{endpoint.rstrip('/')}/{self.repo}/resolve/{revision}/{path}"

    @property
    def headers(self) -> Mapping[str, str]:
        """The hub's token: requests takes it out where the hub redirects to another host."""
        token = _hub_token()
        return {"Authorization": f"Bearer {token}"} if token else {}


_HUB = re.compile(
    r"(?i:hf)://((?:datasets/|spaces/)?[^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?/(.*[^/])"
)


def _parse_hub(text: str) -> URI:
    match = _HUB.fullmatch(text)
    if match is None:
        raise InvalidURIError(
            text, "names no file of a repository", "write hf://owner/repo[@revision]/path/in/repo"
        )
    return HFURI(text, match[1], match[3], urllib.parse.unquote(match[2] or "main"))


def _hub_token() -> str:
    """Read the token as the hub's own client does: from the environment, or where it logged in."""
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return ""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if token:
        return token.strip()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    return path.read_text("utf-8").strip() if path.is_file() else ""


@resolve.register
def _(uri: HFURI, transport_params: Params = None) -> URI:
    """Ask which commit a branch or tag is: so that all that is read is of one."""
    if re.fullmatch("[0-9a-f]{40}", uri.revision):
        return uri
    with explained(uri), http_request("HEAD", uri, transport_params) as reply:
        reply.raise_for_status()
        commit = reply.headers.get("X-Repo-Commit")
    return evolve(uri, revision=commit or uri.revision)


# ── MLflow ────────────────────────────────────────────────────────────────────────────────────


_MODEL_ID = "m-[0-9a-f]{32}"


@frozen
class MLflowURI(URI):
    """A file that MLflow keeps.

    ``runs:/<run_id>/path``, ``models:/<name>/<version or alias>/path``,
    ``models:/<name>@<alias>/path``, ``models:/<model_id>/path``, ``mlflow-artifacts:/path``.
    """

    path: str

    path_field: ClassVar[str] = "path"
    extra: ClassVar[str | None] = "mlflow"
    credentials: ClassVar[str] = (
        "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    )


@frozen
class _NamedURL(HTTPURI):
    """A URL that the user called by another name."""

    location: str
    authorization: str | None = field(repr=False)

    path_field: ClassVar[str] = "location"
    credentials: ClassVar[str] = MLflowURI.credentials

    @property
    def url(self) -> str:
        return self.location

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Authorization": self.authorization} if self.authorization else {}


_MLFLOW_FILES = {
    "runs": r"/+[^/]+/.+",
    "models": rf"/+(?:[^/@]+@[^/]+|{_MODEL_ID}|[^/]+/[^/]+)/.+",
    "mlflow-artifacts": r"/+.+",
}


def _parse_mlflow(text: str) -> URI:
    scheme, _, path = text.partition(":")
    if not re.fullmatch(_MLFLOW_FILES[scheme.lower()], path, re.DOTALL) or path.endswith("/"):
        raise InvalidURIError(
            text,
            "names no file of a run or model",
            "write runs:/<run_id>/path/to/file or models:/<name>/<version or alias>/path/to/file",
        )
    return MLflowURI(text, path.lstrip("/"))


_HOPS = 4  # most that one place of MLflow's is another: a model is in a model is in a run


@resolve.register
def _(uri: MLflowURI, transport_params: Params = None) -> URI:  # noqa: ARG001 - MLflow has its own
    mlflow: Any = imported("mlflow", uri)
    scheme, _, path = uri.text.partition(":")
    location, tracking = f"{scheme.lower()}:{path}", mlflow.get_tracking_uri()
    if tracking.startswith("sqlite:///") and not Path(tracking.removeprefix("sqlite:///")).exists():
        raise CheckpointNotFoundError(  # else MLflow would make one
            uri, f"there is no MLflow database at {tracking}", "set MLFLOW_TRACKING_URI"
        )
    with explained(uri):
        client = mlflow.MlflowClient()
        try:
            for _ in range(_HOPS):
                if location.startswith(("runs:/", "models:/")):
                    location = _mlflow_location(client, location)
        except mlflow.exceptions.MlflowException as err:
            status = err.get_http_status_code()
            if status in {401, 403}:
                raise
            kind: type[CheckpointError] = (
                UnreachableError  # what it says of itself, or of no answer
            )
            if status < 500:  # noqa: PLR2004 - server errors
                kind = CheckpointNotFoundError if status == 404 else CheckpointError  # noqa: PLR2004 - not found
            remedy = "check the name, and MLFLOW_TRACKING_URI"
            raise kind(uri, f"{tracking} says: {err}", remedy) from without_secrets(err)
    if location.startswith("mlflow-artifacts:"):
        return _proxied(uri, tracking, location)
    found = parse_uri(location)
    if isinstance(found, MLflowURI):
        raise InvalidURIError(uri, f"leads to {location}, and no further", "name the run")
    if type(found) is HTTPURI:
        return _NamedURL(uri.text, location, None)
    return evolve(found, text=uri.text)


def _mlflow_location(client: Any, location: str) -> str:
    """Give where the files of a run or a model are, and so the one that is meant."""
    scheme, _, rest = location.partition(":/")
    name, _, path = rest.lstrip("/").partition("/")
    if scheme == "runs":
        return f"{client.get_run(name).info.artifact_uri.rstrip('/')}/{path}"
    if re.fullmatch(_MODEL_ID, name):
        return f"{client.get_logged_model(name).artifact_location.rstrip('/')}/{path}"
    name, _, version = name.partition("@")
    if not version:
        version, _, path = path.partition("/")
    if not version.isdecimal():
        version = client.get_model_version_by_alias(name, version).version
    return f"{client.get_model_version_download_uri(name, version).rstrip('/')}/{path}"


def _proxied(uri: MLflowURI, tracking: str, location: str) -> URI:
    """Give the URL where a tracking server hands a file on (MLflow's REST API, "mlflow-artifacts").

    Its credentials go to the tracking server, and to no other that a run may name.
    """
    server, file = urllib.parse.urlsplit(tracking), urllib.parse.urlsplit(location)
    if server.scheme not in {"http", "https"}:
        raise InvalidURIError(
            uri,
            f"the file lies behind a tracking server, and the tracking URI is {tracking}",
            "set MLFLOW_TRACKING_URI to the server's URL",
        )
    path = f"{server.path.rstrip('/')}/api/2.0/mlflow-artifacts/artifacts{file.path}"
    url = server._replace(netloc=file.netloc or server.netloc, path=urllib.parse.quote(path))
    own = file.netloc in {"", server.netloc}
    return _NamedURL(uri.text, url.geturl(), _mlflow_authorization() if own else None)


def _mlflow_authorization() -> str | None:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user and password:  # in MLflow's order
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    return f"Bearer {token}" if token else None


@open_stream.register
def _(uri: MLflowURI, transport_params: Params = None) -> BinaryIO:
    return open_stream(resolve(uri, transport_params), transport_params)


register_scheme("hf", _parse_hub)
for _scheme in ("runs", "models", "mlflow-artifacts"):
    register_scheme(_scheme, _parse_mlflow)
for _public in (HFURI, MLflowURI):
    _public.__module__ = "anemoi_ckpt"  # where users import it from
