"""Files that MLflow keeps: MLflow's client tells where they are."""

from __future__ import annotations

import base64
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from attrs import evolve, field, frozen

from _anemoi_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    MissingPackageError,
    UnreachableError,
)
from _anemoi_ckpt.places import (
    URI,
    Buffers,
    Entry,
    Page,
    Params,
    Version,
    imported,
    list_all,
    list_page,
    open_stream,
    parse_folder,
    parse_uri,
    path_of,
    read_range,
    register_scheme,
    resolve,
)
from _anemoi_ckpt.places.explained import explained, without_secrets
from _anemoi_ckpt.places.http import HTTPURI, request
from _anemoi_ckpt.variables import few

# ── URI ───────────────────────────────────────────────────────────────────────────────────────

_MODEL_ID = "m-[0-9a-f]{32}"


@frozen
class MLflowURI(URI):
    """A file that MLflow keeps.

    ``runs:/<run_id>/path``, ``models:/<name>/<version or alias>/path``,
    ``models:/<name>@<alias>/path``, ``models:/<model_id>/path``, ``mlflow-artifacts:/path``. A
    stage, such as Production, can stand for the version where the server knows stages.
    """

    path: str

    path_field: ClassVar[str] = "path"
    extra: ClassVar[str | None] = "mlflow"
    credentials: ClassVar[str] = (
        "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
        "put these into ~/.mlflow/credentials)"
    )


@frozen
class _NamedURL(HTTPURI):
    """A URL, under the name that the user gave."""

    location: str
    headers: Mapping[str, str] = field(factory=dict, repr=False, eq=False)
    verify: bool | str | None = None  # which certificates are trusted, as requests has it
    cert: str | None = None  # which is shown
    signing: tuple[bool, str | None] = (False, None)  # by AWS, or by a plug-in of MLflow's

    path_field: ClassVar[str] = "location"
    credentials: ClassVar[str] = MLflowURI.credentials

    @property
    def url(self) -> str:
        return self.location

    @property
    def tls(self) -> Mapping[str, Any]:
        return {"verify": self.verify, "cert": self.cert}

    @property
    def auth(self) -> Any:
        return _signer(self, *self.signing)


# ── parse ─────────────────────────────────────────────────────────────────────────────────────

_MODEL = rf"(?:[^/@]+@[^/]+|{_MODEL_ID}|[^/@]+/[^/]+)"
_ROOTS = {"runs": "[^/]+", "models": _MODEL, "mlflow-artifacts": ""}  # of runs and models
_ENDING = re.compile(r"\.\w*[a-zA-Z]\w*$")  # of a file's name, not of a folder's such as v1.0


def parse_mlflow(text: str) -> URI:
    """Parse ``runs:/…``, ``models:/…`` or ``mlflow-artifacts:/…``: a file, or a folder.

    Raises:
        InvalidURIError: it names nothing of a run or model.
    """
    scheme, _, path = text.partition(":")
    root = _ROOTS[scheme.lower()]
    if not re.fullmatch(rf"/+{root}(?:/.*)?" if root else "/+.+", path, re.DOTALL):
        raise InvalidURIError(
            text,
            "names no file of a run or model",
            "write runs:/<run_id>/path/to/file or models:/<name>/<version or alias>/path/to/file",
        )
    return MLflowURI(text, path.lstrip("/"))


for _scheme in _ROOTS:
    register_scheme(_scheme, parse_mlflow)


# ── client ────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _client_of(uri: MLflowURI) -> Iterator[Any]:
    """Give MLflow's client. What the server says in the block is explained."""
    mlflow: Any = imported("mlflow", uri)
    tracking = mlflow.get_tracking_uri()
    if tracking.startswith("sqlite:///") and not Path(tracking.removeprefix("sqlite:///")).exists():
        raise CheckpointNotFoundError(  # MLflow would make a database
            uri, f"there is no MLflow database at {tracking}", "set MLFLOW_TRACKING_URI"
        )
    with explained(uri):
        try:
            if tracking.startswith(("http://", "https://")):
                _signer(uri, *_signing(uri, tracking))  # or it says what is missing
            yield mlflow.MlflowClient()
        except mlflow.exceptions.MlflowException as err:
            status = err.get_http_status_code()
            if status in {401, 403}:
                raise
            kind = _error_of(status)
            remedy = "check the name, and MLFLOW_TRACKING_URI"
            raise kind(uri, f"{tracking} says: {err}", remedy) from without_secrets(err)


def _signing(uri: URI, tracking: str) -> tuple[bool, str | None]:
    """Tell what signs requests to the tracking server: AWS's signatures, or a plug-in."""
    given = imported("mlflow.utils.credentials", uri).get_default_host_creds(tracking)
    return bool(given.aws_sigv4), given.auth


def _signer(uri: URI, by_aws: bool, plugin: str | None) -> Any:
    """Make what signs requests, as MLflow's client makes it; None if nothing does.

    Raises:
        MissingPackageError: it is not installed.
    """
    if by_aws:
        package = "requests-auth-aws-sigv4"
        return imported(package.replace("-", "_"), uri, package).AWSSigV4("execute-api")
    if plugin is None:
        return None
    found = imported("mlflow.tracking.request_auth.registry", uri).fetch_auth(plugin)
    if found is None:
        problem = f"MLFLOW_TRACKING_AUTH is {plugin!r}, and no such plug-in of MLflow is installed"
        raise MissingPackageError(uri, problem, "install it, or unset MLFLOW_TRACKING_AUTH")
    return found


def _error_of(status: int) -> type[CheckpointError]:
    if status == _NOT_FOUND:
        return CheckpointNotFoundError
    return CheckpointError if status < 500 else UnreachableError  # noqa: PLR2004 - server errors


_NOT_FOUND = 404  # of HTTP


# ── resolve ───────────────────────────────────────────────────────────────────────────────────

_HOPS = 4  # a registered model refers to a logged model, and that to a run
_STAGES = {"none", "staging", "production", "archived"}
_UNNAMED = re.compile("[:.%\"']")  # not in the name of a logged model


@resolve.register
def resolve_mlflow(uri: MLflowURI, transport_params: Params = None) -> URI:
    """Ask the tracking server where a file is.

    Raises:
        InvalidURIError: it is a folder; the error names what is in it.
    """
    with _client_of(uri) as client:
        places = _places(client, _location(uri))
    folders = [place.rpartition("/")[0] for place in places]
    if not _ENDING.search(uri.path):
        _refuse_folder(uri, [place.rstrip("/") for place in places], transport_params)
    name = uri.path.rpartition("/")[2]
    for place, folder in zip(places[:-1], folders, strict=False):  # of a model, before the run
        if name in (each for each, *_ in _listing(uri, folder, transport_params)):
            return _found(uri, place)
    return _found(uri, places[-1])


def _location(uri: MLflowURI) -> str:
    scheme, _, path = uri.text.partition(":")
    return f"{scheme.lower()}:{path}"


def _refuse_folder(uri: MLflowURI, folders: list[str], params: Params) -> None:
    names = [name for folder in folders for name, *_ in _listing(uri, folder, params)]
    if names:
        remedy = f"name what you want of it: {few(sorted(names))}"
        raise InvalidURIError(uri, "names a folder", remedy)
    if uri.path.endswith("/") or re.fullmatch(_ROOTS["runs"], uri.path):
        raise InvalidURIError(uri, "names no file of a run or model", "there is nothing in it yet")


def _places(client: Any, location: str, hops: int = _HOPS) -> list[str]:
    """Tell where a path of a run or a model may be: among the files of a model, or of the run."""
    if not hops or not location.startswith(("runs:/", "models:/")):
        return [location]
    scheme, _, rest = location.partition(":/")
    following = (_of_run if scheme == "runs" else _of_model)(client, rest.lstrip("/"))
    return [place for each in following for place in _places(client, each, hops - 1)]


def _of_run(client: Any, rest: str) -> list[str]:
    """Tell where a path of a run may be: MLflow 3 keeps the models of a run elsewhere."""
    run_id, _, path = rest.partition("/")
    info = client.get_run(run_id).info
    name, _, beneath = path.partition("/")
    models = _logged_models(client, info, name) if path else []
    return [*(_joined(each, beneath) for each in models), _joined(info.artifact_uri, path)]


def _logged_models(client: Any, info: Any, name: str) -> list[str]:
    """Tell where the newest model of this name is that a run has logged, if there is one."""
    if not name or _UNNAMED.search(name):
        return []
    token: str | None = None
    while True:
        try:
            page = client.search_logged_models(
                [info.experiment_id], filter_string=f"name = '{name}'", page_token=token
            )
        except Exception as err:
            if _status_of(err) == _NOT_FOUND:  # a server of before MLflow 3
                return []
            raise
        for model in page:
            if model.source_run_id == info.run_id:
                return [model.artifact_location]
        token = page.token
        if not token:
            return []


def _status_of(err: Exception) -> int | None:
    """Give the status of MLflow's exception; None of another's."""
    ask = getattr(err, "get_http_status_code", None)
    return ask() if ask else None


def _of_model(client: Any, rest: str) -> list[str]:
    """Tell where a path of a model is."""
    name, _, path = rest.partition("/")
    if re.fullmatch(_MODEL_ID, name):
        return [_joined(client.get_logged_model(name).artifact_location, path)]
    name, _, version = name.partition("@")
    if not version:
        version, _, path = path.partition("/")
        version = _newest_of_stage(client, name, version) or version
    if not version.isdecimal():
        version = client.get_model_version_by_alias(name, version).version
    return [_joined(client.get_model_version_download_uri(name, version), path)]


def _newest_of_stage(client: Any, name: str, stage: str) -> str | None:
    """Tell the newest version of a stage; None if it is none, or the server knows no stages."""
    if stage.lower() not in _STAGES:
        return None
    try:
        versions = client.get_latest_versions(name, [stage])
    except Exception as err:
        if _status_of(err) == _NOT_FOUND:
            return None
        raise
    return str(max(int(each.version) for each in versions)) if versions else None


def _joined(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}"


def _found(uri: MLflowURI, location: str) -> URI:
    """Give the place that a location is, under the name that the user gave."""
    if location.startswith("mlflow-artifacts:"):
        return _proxied(uri, location)
    found = parse_uri(location)
    if isinstance(found, MLflowURI):
        raise InvalidURIError(uri, f"leads to {location}, and no further", "name the run")
    if type(found) is HTTPURI:
        return _NamedURL(uri.text, location)
    return evolve(found, text=uri.text)


def _proxied(uri: MLflowURI, location: str, query: Mapping[str, str] | None = None) -> URI:
    """Give a file's URL at the tracking server (MLflow's REST API, "mlflow-artifacts").

    The tracking server's credentials go to no other server that a run may name.
    """
    tracking = imported("mlflow", uri).get_tracking_uri()
    server, file = urllib.parse.urlsplit(tracking), urllib.parse.urlsplit(location)
    if server.scheme not in {"http", "https"}:
        raise InvalidURIError(
            uri,
            f"the file lies behind a tracking server, and the tracking URI is {tracking}",
            "set MLFLOW_TRACKING_URI to the server's URL",
        )
    path = f"{server.path.rstrip('/')}/api/2.0/mlflow-artifacts/artifacts{file.path}"
    url = server._replace(
        netloc=file.netloc or server.netloc,
        path=urllib.parse.quote(path),
        query=urllib.parse.urlencode(query or {}),
    )
    own = file.netloc in {"", server.netloc}
    return (
        _with_credentials(uri, url.geturl(), tracking) if own else _NamedURL(uri.text, url.geturl())
    )


def _with_credentials(uri: MLflowURI, url: str, tracking: str) -> URI:
    """Add what MLflow's client sends and trusts: of the environment, or ~/.mlflow/credentials."""
    given = imported("mlflow.utils.credentials", uri).get_default_host_creds(tracking)
    headers = imported("mlflow.tracking.request_header.registry", uri).resolve_request_headers()
    workspace = imported("mlflow.utils.workspace_context", uri).get_request_workspace()
    if workspace:
        headers["X-MLFLOW-WORKSPACE"] = workspace
    if given.token:
        headers["Authorization"] = f"Bearer {given.token}"
    if given.username and given.password:  # in MLflow's order
        pair = f"{given.username}:{given.password}".encode()
        headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
    verify = None if given.verify is True else given.verify  # then REQUESTS_CA_BUNDLE holds
    signing = _signing(uri, tracking)
    return _NamedURL(uri.text, url, headers, verify, given.client_cert_path, signing)


# ── list ──────────────────────────────────────────────────────────────────────────────────────

_Listed = tuple[str, int | None, datetime | None]  # a name, with a slash of a folder; size; time


def _listing(uri: MLflowURI, folder: str, params: Params) -> Iterator[_Listed]:
    """List what is in a folder, where MLflow keeps it; nothing where there is no such folder."""
    if folder.startswith("mlflow-artifacts:"):
        yield from _proxied_listing(uri, folder, params)
        return
    place = parse_folder(folder.rstrip("/") or "/")
    start = len(path_of(place))
    with suppress(CheckpointNotFoundError):
        for each in list_all(place, params):
            path = path_of(each.uri)
            yield path[start:], each.size, each.modified


def _proxied_listing(uri: MLflowURI, folder: str, params: Params) -> Iterator[_Listed]:
    """Ask the tracking server, which tells no times."""
    scheme, netloc, path, *_ = urllib.parse.urlsplit(folder)
    root = f"{scheme}://{netloc}" if netloc else f"{scheme}:"
    place = cast("HTTPURI", _proxied(uri, root, {"path": path.lstrip("/")}))
    with explained(uri), request("GET", place, params) as response:
        if response.status_code == _NOT_FOUND:
            return
        response.raise_for_status()
        files = response.json().get("files", ())
    for each in files:
        ending, size = ("/", None) if each["is_dir"] else ("", int(each.get("file_size") or 0))
        yield each["path"].rpartition("/")[2] + ending, size, None


@list_page.register
def list_mlflow_folder(
    uri: MLflowURI,
    token: str | None = None,  # noqa: ARG001 - a folder is one page
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List a folder of a run or a model, where MLflow keeps it."""
    with _client_of(uri) as client:
        places = _places(client, _location(uri).rpartition("/")[0])
    folder, _, name = uri.path.rpartition("/")
    folder += "/" * bool(folder)
    found = {
        path: Entry.beneath(uri, folder + path, size, modified)
        for place in reversed(places)  # a model's file hides the run's
        for path, size, modified in _walk(uri, place, transport_params, recursive=recursive)
        if path.startswith(name)
    }
    return Page(list(found.values()))


@list_page.register
def list_proxied_folder(
    uri: _NamedURL,
    token: str | None = None,
    transport_params: Params = None,
    *,
    recursive: bool = False,
) -> Page:
    """List what lies beside a file at the tracking server: by the name that the user gave."""
    return list_page(parse_uri(uri.text), token, transport_params, recursive=recursive)


def _walk(uri: MLflowURI, folder: str, params: Params, *, recursive: bool) -> Iterator[_Listed]:
    for name, size, modified in _listing(uri, folder, params):
        if recursive and name.endswith("/"):
            for path, *known in _walk(uri, _joined(folder, name[:-1]), params, recursive=True):
                yield (name + path, *known)  # type: ignore[misc] # mypy forgets what they are
        else:
            yield name, size, modified


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
