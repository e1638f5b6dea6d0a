"""Places as fsspec has them, for programs that ask fsspec whether a file exists.

fsspec's own packages for stores (s3fs, gcsfs, adlfs) are left alone where they are installed.

`ls` names ``s3://bucket/key`` as ``places::s3:/bucket/key``, which fsspec reads as a chain that
begins with our file system: Lightning's ``ckpt_path="last"`` puts what it finds through
`os.path.normpath`, which would make ``s3:/bucket/key`` of the usual form, a file on the disk.
"""

from __future__ import annotations

import importlib
import re
from contextlib import suppress
from typing import Any

from _anemoi_ckpt.blocks import first_alone
from _anemoi_ckpt.errors import InvalidURIError
from _anemoi_ckpt.places import Entry, parse_folder, parse_uri, path_of, remove_object
from _anemoi_ckpt.transport import Source, Transport, attempted, listed, locate

_PROTOCOLS = ("s3", "s3a", "s3n", "gs", "gcs", "az", "abfs", "abfss")
_CHAIN = "places"  # as a protocol of fsspec: of letters alone, as fsspec of 2025 has it in a chain
_CHAINED = re.compile(rf"{_CHAIN}::({'|'.join(_PROTOCOLS)}):/+")


def register(transport: Transport) -> None:
    """Give fsspec our places for the stores that it has no package for.

    Args:
        transport: how they are reached from now on.
    """
    fsspec = importlib.import_module("fsspec")
    ours = type("PlacesFileSystem", (_Places, fsspec.AbstractFileSystem), {"transport": transport})
    for protocol in _PROTOCOLS:
        try:
            known = fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError):  # not installed, and not known
            known = None
        if known is None or issubclass(known, _Places):
            fsspec.register_implementation(protocol, ours, clobber=True)
    fsspec.register_implementation(_CHAIN, ours, clobber=True)


def unchained(path: Any) -> Any:
    """Give a name that `ls` made its usual form; anything else as it is.

    >>> unchained("places::s3:/bucket/run/last.ckpt")
    's3://bucket/run/last.ckpt'
    """
    match = _CHAINED.match(path) if isinstance(path, str) else None
    return f"{match[1]}://{path[match.end() :]}" if match else path


class _Places:
    """What fsspec asks of a file system, for reading. Paths keep the scheme: it tells the store."""

    protocol = _PROTOCOLS
    cachable = False  # fsspec keeps one instance for the process otherwise, and its transport
    transport: Transport

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return unchained(str(path)).rstrip("/")

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        """Tell what is at a path.

        Raises:
            FileNotFoundError: neither an object nor a folder.
            CheckpointError: the store cannot be asked.
        """
        name = _with_scheme(self._strip_protocol(path))
        try:
            uri = parse_uri(name)
        except InvalidURIError:  # the bucket itself
            uri = parse_folder(name)
            next(listed(uri, self.transport), None)
            return _described(Entry(uri))
        key = path_of(uri)
        for entry in listed(uri, self.transport):
            if path_of(entry.uri).rstrip("/") == key:
                return _described(entry)
        raise FileNotFoundError(path)

    def exists(self, path: str, **_options: Any) -> bool:
        """Tell whether an object or a folder is there. A store that gives no answer raises."""
        return self._type(path) != ""

    def isfile(self, path: str) -> bool:
        """Tell whether an object is there."""
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        """Tell whether a folder is there."""
        return self._type(path) == "directory"

    def _type(self, path: str) -> str:
        with suppress(FileNotFoundError):
            return str(self.info(path)["type"])
        return ""

    def ls(self, path: str, detail: bool = True, **_options: Any) -> list[Any]:
        """List a folder, or name the object that is there.

        Raises:
            FileNotFoundError: neither an object nor a folder.
        """
        entries = listed(parse_folder(_with_scheme(path)), self.transport)
        described = [_described(each) for each in entries] or [self.info(path)]
        if detail:
            return described
        return [f"{_CHAIN}::{each['name'].replace('://', ':/', 1)}" for each in described]

    def modified(self, path: str) -> Any:
        """Tell when an object was last written to."""
        return self.info(path)["modified"]

    def rm_file(self, path: str) -> None:
        """Remove an object."""
        uri = parse_uri(_with_scheme(path))
        attempted(self.transport, lambda: remove_object(uri, self.transport.params))

    def _open(self, path: str, mode: str = "rb", **_options: Any) -> Any:
        if mode != "rb":
            raise ValueError(f"{path} can only be read here; anemoi_ckpt.save writes to it")
        uri = locate(_with_scheme(path), self.transport)
        return first_alone(Source(uri, None, self.transport))[1]


def _with_scheme(path: str) -> str:
    """Refuse a path that does not tell its store, as fsspec's own packages take them."""
    name = unchained(str(path))
    if "://" not in name:
        raise ValueError(f"{path!r} does not tell its store: write the scheme, as s3://{path}")
    return str(name)


def _described(entry: Entry) -> dict[str, Any]:
    return {
        "name": str(entry.uri).rstrip("/"),
        "size": entry.size,
        "type": "directory" if entry.is_folder else "file",
        "modified": entry.modified,
    }
