"""Files that MLflow keeps: MLflow's client tells where they are."""

from __future__ import annotations

import base64
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from attrs import evolve, field, frozen

from _anemoi_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    UnreachableError,
)
from _anemoi_ckpt.places import (
    URI,
    Buffers,
    Params,
    Version,
    imported,
    open_stream,
    parse_uri,
    read_range,
    register_scheme,
    resolve,
)
from _anemoi_ckpt.places.explained import explained, without_secrets
from _anemoi_ckpt.places.http import HTTPURI

# ── URI ───────────────────────────────────────────────────────────────────────────────────────

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
    """A URL, under the name that the user gave."""

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


# ── parse ─────────────────────────────────────────────────────────────────────────────────────

_FILES = {
    "runs": r"/+[^/]+/.+",
    "models": rf"/+(?:[^/@]+@[^/]+|{_MODEL_ID}|[^/]+/[^/]+)/.+",
    "mlflow-artifacts": r"/+.+",
}


def parse_mlflow(text: str) -> URI:
    """Parse ``runs:/…``, ``models:/…`` or ``mlflow-artifacts:/…``.

    Raises:
        InvalidURIError: it names no file of a run or model.
    """
    scheme, _, path = text.partition(":")
    if not re.fullmatch(_FILES[scheme.lower()], path, re.DOTALL) or path.endswith("/"):
        raise InvalidURIError(
            text,
            "names no file of a run or model",
            "write runs:/<run_id>/path/to/file or models:/<name>/<version or alias>/path/to/file",
        )
    return MLflowURI(text, path.lstrip("/"))


for _scheme in ("runs", "models", "mlflow-artifacts"):
    register_scheme(_scheme, parse_mlflow)


# ── resolve ───────────────────────────────────────────────────────────────────────────────────

_HOPS = 4  # a registered model refers to a logged model, and that to a run


@resolve.register
def resolve_mlflow(uri: MLflowURI, transport_params: Params = None) -> URI:  # noqa: ARG001 - MLflow has its own
    """Ask the tracking server where a file is."""
    mlflow: Any = imported("mlflow", uri)
    scheme, _, path = uri.text.partition(":")
    location, tracking = f"{scheme.lower()}:{path}", mlflow.get_tracking_uri()
    if tracking.startswith("sqlite:///") and not Path(tracking.removeprefix("sqlite:///")).exists():
        raise CheckpointNotFoundError(  # MLflow would make a database
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
            kind = _error_of(status)
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


def _error_of(status: int) -> type[CheckpointError]:
    if status == 404:  # noqa: PLR2004 - Not Found
        return CheckpointNotFoundError
    return CheckpointError if status < 500 else UnreachableError  # noqa: PLR2004 - server errors


def _mlflow_location(client: Any, location: str) -> str:
    """Ask where the files of a run or a model are, and name the one that is meant."""
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
    """Give a file's URL at the tracking server (MLflow's REST API, "mlflow-artifacts").

    The tracking server's credentials go to no other server that a run may name.
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


# ── open ──────────────────────────────────────────────────────────────────────────────────────


@open_stream.register
def open_mlflow(uri: MLflowURI, transport_params: Params = None) -> BinaryIO:
    """Open the file where the tracking server says it is."""
    return open_stream(resolve(uri, transport_params), transport_params)


# ── range ─────────────────────────────────────────────────────────────────────────────────────


@read_range.register
def read_mlflow_range(
    uri: MLflowURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,
) -> Version:
    """Read a range of the file where the tracking server says it is."""
    return read_range(resolve(uri, transport_params), offset, buffers, pin, transport_params)
