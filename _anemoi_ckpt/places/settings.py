"""What Anemoi's settings say of S3 and Azure: endpoint and keys, for all buckets or for some."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import os
import tomllib
from pathlib import Path
from typing import Any

from attrs import field, fields, frozen

from _anemoi_ckpt.errors import CheckpointError, MissingPackageError

_SECTION = "object-storage"
_PREFIX = "ANEMOI_SETTINGS_OBJECT_STORAGE__"
_OTHERS = frozenset({"type"})  # which anemoi-utils itself ignores
S3 = frozenset({"access_key_id", "secret_access_key", "region"})  # settings of this store alone
AZURE = frozenset({"account_name", "account_key", "sas_token"})  # likewise
_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})  # as pydantic reads a flag
_SECRET = ("access_key_id", "secret_access_key", "account_name", "account_key", "sas_token")


@frozen
class StoreSettings:
    """How to reach a bucket or container; what is None, the SDK or the environment tells."""

    endpoint_url: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    region: str | None = None
    skip_signature: bool = False
    account_name: str | None = field(default=None, repr=False)
    account_key: str | None = field(default=None, repr=False)
    sas_token: str | None = field(default=None, repr=False)


_KINDS = {
    each.name: bool if each.name == "skip_signature" else str for each in fields(StoreSettings)
}


def settings_path() -> Path:
    """Give the file that `ANEMOI_SETTINGS_FILE` names, or the one in the user's home."""
    named = os.environ.get("ANEMOI_SETTINGS_FILE")
    path = Path(named).expanduser() if named else Path.home() / ".config/anemoi/settings.toml"
    return path.with_suffix(".toml")


def store_settings(bucket: str, store: frozenset[str] = S3) -> StoreSettings:
    """Tell how to reach a bucket: by the one section whose glob it matches, else by all buckets'.

    As anemoi-utils has it: the environment comes before the file with secrets, and that before the
    other; a bucket's own section stands alone. Each file may be one of TOML or of YAML. What names
    keys or regions of the other store alone is that one's, and so is an endpoint of all buckets
    without any: it is S3's.

    Args:
        bucket: or container.
        store: `S3` or `AZURE`.

    Raises:
        MissingPackageError: a file is of YAML, and PyYAML is not installed.
        CheckpointError: a file is no TOML, says something else than settings, or others can read
            the keys in it; or two globs match.
    """
    path = settings_path()
    merged: dict[str, Any] = {}
    for each in (path, path.with_suffix(".secrets.toml")):
        # anemoi-utils reads YAML, too; a section of the TOML file takes the place of YAML's
        for name, value in (_section(each) or _section(each.with_suffix(".yaml"))).items():
            both = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = {**merged[name], **value} if both else value
    matching = [
        name
        for name, value in merged.items()
        if isinstance(value, dict) and fnmatch.fnmatch(bucket, name)
    ]
    if len(matching) > 1:
        problem = (
            f"the sections {' and '.join(map(repr, matching))} are both for the bucket {bucket}"
        )
        raise CheckpointError(path, problem, "keep one of them")
    if matching:
        chosen = merged[matching[0]]
    else:
        chosen = {name: value for name, value in merged.items() if not isinstance(value, dict)}
        chosen |= _of_environment()
    kept = {name: value for name, value in chosen.items() if name in _KINDS and value != ""}
    is_others = not kept.keys().isdisjoint((S3 | AZURE) - store)
    if kept.keys().isdisjoint(store) and (is_others or (store is AZURE and not matching)):
        return StoreSettings()
    if ("access_key_id" in kept) != ("secret_access_key" in kept):
        problem = f"for the bucket {bucket} it has one of access_key_id and secret_access_key"
        raise CheckpointError(path, problem, "give both, or neither")
    if "://" not in kept.get("endpoint_url", "://"):
        problem = f"the endpoint_url of the bucket {bucket} has no scheme"
        raise CheckpointError(path, problem, "write https:// before the host")
    return StoreSettings(**kept)


def _of_environment() -> dict[str, Any]:
    """Read what the environment says for all buckets."""
    found: dict[str, Any] = {}
    for name, kind in _KINDS.items():
        value = os.environ.get(_PREFIX + name.upper())
        if value:
            found[name] = value if kind is str else value.lower() in _TRUE
    return found


def _section(path: Path) -> dict[str, Any]:
    """Read one file's section, again only where the file has changed."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as err:
        raise _unreadable(path, err) from err
    return _parsed(path, status.st_mtime_ns, status.st_size, status.st_mode)


@functools.lru_cache(maxsize=8)
def _parsed(path: Path, _modified: int, _size: int, mode: int) -> dict[str, Any]:
    """Read and check one file's section."""
    try:
        text = path.read_text("utf-8")
    except OSError as err:
        raise _unreadable(path, err) from err
    except ValueError:  # no UTF-8
        raise CheckpointError(path, "it is no text", "correct it") from None
    tree = _yaml(path, text) if path.suffix == ".yaml" else _toml(path, text)
    section = tree.get(_SECTION, tree.get(_SECTION.replace("-", "_"), {}))
    if not isinstance(section, dict):
        raise CheckpointError(path, f"{_SECTION} is no table", f"write [{_SECTION}]")
    told = {name: value for name, value in section.items() if not isinstance(value, dict)}
    tables = {name: value for name, value in section.items() if isinstance(value, dict)}
    result: dict[str, Any] = _checked(path, f"[{_SECTION}]", told)
    for name, table in tables.items():
        result[name] = _checked(path, f"[{_SECTION}.{name!r}]", table)
    every = [result, *(value for value in result.values() if isinstance(value, dict))]
    if os.name == "posix" and mode & 0o077 and any(set(_SECRET) & set(each) for each in every):
        remedy = f"chmod 600 {path}"
        raise CheckpointError(path, "it has keys in it that other users could read", remedy)
    return result


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as err:  # its text may show a line, with a key in it
        where = f" ({err.args[0].rpartition('(')[2]}" if "(at " in str(err) else ""
        raise CheckpointError(path, f"it is no TOML{where}", "correct it") from None


def _yaml(path: Path, text: str) -> dict[str, Any]:
    if not any(name in text for name in (_SECTION, _SECTION.replace("-", "_"))):
        return {}  # which needs no package to be told
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as err:
        problem, remedy = "to read it takes PyYAML, which is not installed", "pip install pyyaml"
        raise MissingPackageError(path, problem, remedy) from err
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as err:  # likewise
        mark = getattr(err, "problem_mark", None)
        where = f" (at line {mark.line + 1})" if mark else ""
        raise CheckpointError(path, f"it is no YAML{where}", "correct it") from None
    return tree if isinstance(tree, dict) else {}


def _unreadable(path: Path, err: OSError) -> CheckpointError:
    """Say that a file of settings cannot be read."""
    return CheckpointError(path, f"it cannot be read ({err.strerror})", "check its permissions")


def _checked(path: Path, where: str, table: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is no setting, without its value: that may be a key."""
    result = {}
    for given, value in table.items():
        name = given.removeprefix("aws_")  # as anemoi-utils had it
        if name not in _KINDS and name not in _OTHERS:
            problem = f"{given} in {where} is no setting"
            raise CheckpointError(path, problem, f"there are {', '.join(_KINDS)}")
        kind = _KINDS.get(name, str)
        if not isinstance(value, kind):
            problem = f"{given} in {where} is of type {type(value).__name__}"
            raise CheckpointError(path, problem, f"give a {kind.__name__}")
        result[name] = value
    return result
