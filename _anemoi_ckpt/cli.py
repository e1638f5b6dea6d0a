"""The command line: `anemoi-ckpt`, or `python -m anemoi_ckpt`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import anemoi_ckpt
from _anemoi_ckpt.cache import cache_entries, cache_folder, clear_cache
from _anemoi_ckpt.errors import CheckpointError, redact
from _anemoi_ckpt.places import parse_uri
from _anemoi_ckpt.places.local import LocalURI
from _anemoi_ckpt.saving import is_safetensors
from _anemoi_ckpt.tables import sized
from _anemoi_ckpt.transport import Transport, locate, open_for_writing, stream_pinned


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit code: 0, 1 with one line of error, or 2 for bad usage."""
    parsed = _parser().parse_args(arguments)
    try:
        sys.stdout.write(parsed.run(parsed))
    except (CheckpointError, OSError, ValueError) as err:
        sys.stderr.write(f"anemoi-ckpt: {redact(str(err))}\n")
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it for SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("anemoi-ckpt", description="Look into checkpoints, and copy.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("peek", help="tell what is in a checkpoint")
    command.add_argument("uri", metavar="URI")
    command.set_defaults(run=_run_peek)

    command = commands.add_parser("metadata", help="print the metadata that Anemoi embeds, as JSON")
    command.add_argument("uri", metavar="URI")
    command.set_defaults(run=_run_metadata)

    command = commands.add_parser("copy", help="copy a checkpoint, or what is wanted of it")
    command.add_argument("uri", metavar="URI")
    command.add_argument("to", metavar="DEST", help="a file or object; .safetensors: weights")
    command.add_argument("--weights", action="store_true", help="the state dict alone")
    command.add_argument("--include", metavar="GLOB", action="append", help="these weights alone")
    command.add_argument("--exclude", metavar="GLOB", action="append", help="not these weights")
    command.add_argument("--cast", metavar="DTYPE", help="floating-point weights to bfloat16, say")
    command.set_defaults(run=_run_copy)

    command = commands.add_parser("cache", help="list what download keeps for later, or clear it")
    command.add_argument("glob", metavar="GLOB", nargs="?", default="*", help="of these places")
    command.add_argument("--clear", action="store_true", help="remove them")
    command.set_defaults(run=_run_cache)
    return parser


def _run_peek(parsed: argparse.Namespace) -> str:
    return f"{anemoi_ckpt.peek(parsed.uri)}\n"


def _run_metadata(parsed: argparse.Namespace) -> str:
    return json.dumps(anemoi_ckpt.metadata(parsed.uri), indent=2) + "\n"


def _run_copy(parsed: argparse.Namespace) -> str:
    place, to = locate(parsed.uri, Transport()), parse_uri(parsed.to)
    if isinstance(to, LocalURI) and Path(to.path).is_dir():
        to = parse_uri(Path(to.path) / place.filename)
    converted = is_safetensors(to) and not is_safetensors(place)
    strategies = _chosen_strategies(parsed, weights=parsed.weights or converted)
    if strategies:
        anemoi_ckpt.save(anemoi_ckpt.load(place, *strategies), to, metadata=place)
    elif isinstance(to, LocalURI):
        anemoi_ckpt.download(place, to.path)
    else:
        with open_for_writing(to, Transport()) as stream:
            stream_pinned(place, stream, Transport())
    return f"{redact(str(to))}\n"


def _chosen_strategies(parsed: argparse.Namespace, *, weights: bool) -> list[Any]:
    ours = anemoi_ckpt.strategies  # a user's own strategies.py in the working folder is another
    chosen = [ours.weights] if weights else []
    if parsed.include:
        chosen.append(ours.include(*parsed.include))
    if parsed.exclude:
        chosen.append(ours.exclude(*parsed.exclude))
    if parsed.cast:
        dtype = getattr(torch, parsed.cast, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"--cast takes a dtype of torch, such as bfloat16, not {parsed.cast!r}"
            )
        chosen.append(ours.cast(dtype))
    return chosen


def _run_cache(parsed: argparse.Namespace) -> str:
    entries = cache_entries(parsed.glob)
    if parsed.clear:
        entries = clear_cache(entries)
    lines = [
        f"{sized(entry.size):>8}  {entry.place}{'' if entry.file else '  (not whole)'}"
        + ("" if parsed.clear else f"\n{'':>8}  {entry.file or entry.folder}")
        for entry in entries
    ]
    total = sized(sum(entry.size for entry in entries))
    what = "removed" if parsed.clear else f"in {cache_folder()}"
    return "".join(f"{line}\n" for line in (*lines, f"{total:>8}  {what}"))
