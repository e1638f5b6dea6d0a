"""Places as fsspec has them, for programs that ask fsspec whether a file exists.

fsspec's own packages for stores (s3fs, gcsfs, adlfs) are left alone where they are installed.
"""

from __future__ import annotations

import importlib
import io
from typing import Any

from _anemoi_ckpt.errors import InvalidURIError
from _anemoi_ckpt.places import (
    URI,
    Entry,
    Params,
    open_stream,
    open_writer,
    parse_folder,
    parse_uri,
    remove_object,
)
from _anemoi_ckpt.transport import Transport, attempted, listed

_PROTOCOLS = ("s3", "gs", "gcs", "az", "abfs", "abfss")


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


class _Places:
    """What fsspec asks of a file system. Paths keep their scheme, which tells the store."""

    protocol = _PROTOCOLS
    cachable = False  # fsspec keeps one instance for the process otherwise, and its transport
    transport: Transport

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return str(path).rstrip("/")

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        """Tell what is at a path.

        Raises:
            FileNotFoundError: neither an object nor a folder.
        """
        name = self._strip_protocol(path)
        try:
            uri = parse_uri(name)
        except InvalidURIError:  # the bucket itself
            uri = parse_folder(name)
            next(listed(uri, self.transport), None)
            return _described(Entry(uri))
        key = getattr(uri, uri.path_field)
        for entry in listed(uri, self.transport):
            if getattr(entry.uri, uri.path_field).rstrip("/") == key:
                return _described(entry)
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_options: Any) -> list[Any]:
        """List a folder, or name the object that is there.

        Raises:
            FileNotFoundError: neither an object nor a folder.
        """
        found = [_described(each) for each in listed(parse_folder(path), self.transport)]
        found = found or [self.info(path)]
        return found if detail else [each["name"] for each in found]

    def modified(self, path: str) -> Any:
        """Tell when an object was last written to."""
        return self.info(path)["modified"]

    def rm_file(self, path: str) -> None:
        """Remove an object."""
        uri = parse_uri(path)
        attempted(self.transport, lambda: remove_object(uri, self.transport.params))

    def _open(self, path: str, mode: str = "rb", **_options: Any) -> Any:
        uri, params = parse_uri(path), self.transport.params
        return open_stream(uri, params) if mode == "rb" else _Upload(uri, params)


def _described(entry: Entry) -> dict[str, Any]:
    return {
        "name": str(entry.uri).rstrip("/"),
        "size": entry.size,
        "type": "directory" if entry.is_folder else "file",
        "modified": entry.modified,
    }


class _Upload(io.BytesIO):
    """What is written when it is closed."""

    def __init__(self, uri: URI, params: Params) -> None:
        super().__init__()
        self._target = uri, params

    def close(self) -> None:
        if self.closed:
            return
        data = self.getvalue()
        super().close()
        with open_writer(*self._target) as stream:
            stream.write(data)
