"""What the stores that answer over HTTP share: range headers, bodies, digests."""

from __future__ import annotations

import base64
import http.client
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from _anemoi_ckpt.places import Buffers
from _anemoi_ckpt.places.interrupts import register


def range_header(offset: int, buffers: Buffers) -> str:
    """Write the value of a Range header (RFC 9110 14.1.2)."""
    length = buffers.size - buffers.filled
    return f"bytes=-{length}" if offset < 0 else f"bytes={offset}-{offset + length - 1}"


def register_body(response: Any) -> None:
    """Register the socket beneath urllib3's response: a client of the user's own does not.

    Raises:
        ConnectionAbortedError: the read was stopped. Then the response is closed.
    """
    inner = getattr(response, "_fp", None)
    try:
        register(getattr(getattr(getattr(inner, "fp", None), "raw", None), "_sock", None))
    except OSError:
        response.close()
        raise


def read_socket(response: Any, buffers: Buffers) -> None:
    """Fill buffers from the socket beneath urllib3's response, which itself copies each byte."""
    socket = getattr(response, "_fp", None)
    if not isinstance(socket, http.client.HTTPResponse):
        buffers.readfrom(response)
        return
    register_body(response)
    buffers.readfrom(socket)
    if socket.isclosed():  # at its end: the connection can be used again
        response.release_conn()


def decoded(digests: Mapping[str, str | None]) -> dict[str, bytes]:
    """Decode digests from base64, without those that are none (S3's of a multipart upload)."""
    found = {}
    for name, text in digests.items():
        with suppress(ValueError):
            found[name] = base64.b64decode(text or "", validate=True)
    return {name: digest for name, digest in found.items() if digest}
