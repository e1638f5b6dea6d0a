"""The command line: `anemoi-ckpt`, or `python -m anemoi_ckpt`.

run · parse · look · copy · cache
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import anemoi_ckpt
from _anemoi_ckpt.cache import CacheEntry, cache_entries, cache_folder, clear_cache
from _anemoi_ckpt.errors import CheckpointError, harmless, redact
from _anemoi_ckpt.pickles.inert import walk
from _anemoi_ckpt.places import URI, parse_uri
from _anemoi_ckpt.places.local import LocalURI, explained_writing
from _anemoi_ckpt.saving import is_safetensors
from _anemoi_ckpt.tables import plain, sized
from _anemoi_ckpt.transport import RETRIES, Transport, locate, open_for_writing, stream_pinned

_Answer = tuple[str, int]  # what is printed, and the exit code
_PIPE = "-"  # standard input, or output
_BROKEN_PIPE = 141  # as shells have it for SIGPIPE
_INTERRUPTED = 130  # likewise for SIGINT


# ── run ───────────────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit code: 0, 1 with one line of error, or 2 for bad usage.

    `diff` gives 1 where something differs, and `verify` where something is damaged.
    """
    parser = _parser()
    with suppress(ImportError):  # an extra: completion in a shell
        importlib.import_module("argcomplete").autocomplete(parser)
    parsed = parser.parse_args(arguments)
    level = logging.INFO if parsed.verbose else logging.ERROR if parsed.quiet else logging.WARNING
    logging.basicConfig(format="anemoi-ckpt: %(message)s")
    logging.getLogger("anemoi_ckpt").setLevel(level)
    try:
        text, code = _run(parsed)
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # by `head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return _BROKEN_PIPE
    except (CheckpointError, OSError, ValueError, TypeError) as err:
        lines = (harmless(line.strip()) for line in redact(str(err)).splitlines())
        sys.stderr.write(f"anemoi-ckpt: {'; '.join(lines)}\n")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _run(parsed: argparse.Namespace) -> _Answer:
    run: Callable[[argparse.Namespace], _Answer] = parsed.run
    return run(parsed)


# ── parse ─────────────────────────────────────────────────────────────────────────────────────

_EXAMPLES = {
    "ls": ("s3://bucket/run/", "'s3://bucket/**/epoch=*.ckpt' --json"),
    "latest": ("gs://bucket/run/", "'run/*/last.ckpt'"),
    "peek": ("s3://bucket/run/last.ckpt --tree", "https://host/model.safetensors --json"),
    "plan": ("s3://bucket/run/last.ckpt --weights", "last.ckpt --include 'encoder.*'"),
    "diff": ("s3://bucket/a.ckpt s3://bucket/b.ckpt", "a.ckpt b.ckpt --include encoder --values"),
    "verify": ("s3://bucket/run/last.ckpt", "last.ckpt --values --json"),
    "metadata": ("s3://bucket/run/last.ckpt", "inference-last.ckpt"),
    "copy": (
        "s3://bucket/run/last.ckpt light.ckpt --drop-optimizer",
        "last.ckpt weights.safetensors --strip-prefix model. --cast bfloat16",
    ),
    "cache": ("", "'s3://bucket/*' --clear"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "anemoi-ckpt", description="Find checkpoints, look into them, and copy what is wanted."
    )
    version = f"anemoi-ckpt {anemoi_ckpt.__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[Any], _Answer], text: str) -> argparse.ArgumentParser:
        examples = "".join(f"\n  anemoi-ckpt {name} {each}".rstrip() for each in _EXAMPLES[name])
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[:1].upper()}{text[1:]}.",
            epilog=f"examples:{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("-v", "--verbose", action="store_true", help="tell each attempt")
        command.add_argument("-q", "--quiet", action="store_true", help="no warnings, no bar")
        command.add_argument("--retries", type=int, metavar="N", default=RETRIES)
        command.add_argument("--timeout", type=float, metavar="SECONDS")
        return command

    command = add("ls", _run_ls, "list the checkpoints of a folder, or those that a glob chooses")
    command.add_argument("pattern", metavar="URI", help="a folder; or a glob, in quotes")
    command = add("latest", _run_latest, "tell which checkpoint of a folder or glob is the newest")
    command.add_argument("pattern", metavar="URI", help="a folder; or a glob, in quotes")
    command = add("peek", _run_peek, "tell what is in a checkpoint")
    command.add_argument("uri", metavar="URI")
    command.add_argument("--tree", action="store_true", help="the modules and what they take")
    command = add("plan", _run_plan, "tell what a load would move")
    command.add_argument("uri", metavar="URI")
    _add_strategies(command)
    command = add("diff", _run_diff, "tell how two checkpoints differ; exits with 1 if they do")
    command.add_argument("a", metavar="URI")
    command.add_argument("b", metavar="URI")
    command.add_argument("--values", action="store_true", help="fetch what differs: how far apart?")
    _add_strategies(command)
    command = add("verify", _run_verify, "tell whether a checkpoint is whole; exits with 1 if not")
    command.add_argument("uri", metavar="URI")
    command.add_argument("--values", action="store_true", help="look for NaN and infinity, too")
    command = add("metadata", _run_metadata, "print the metadata that Anemoi embeds, as JSON")
    command.add_argument("uri", metavar="URI")
    command = add("copy", _run_copy, "copy a checkpoint, or what is wanted of it")
    command.add_argument("uri", metavar="URI", help="'-' is standard input")
    command.add_argument(
        "to", metavar="DEST", help="a file, a folder or an object; '-' is standard output"
    )
    _add_strategies(command)
    command = add("cache", _run_cache, "list what download keeps for later, or clear it")
    command.add_argument("glob", metavar="GLOB", nargs="?", default="*", help="of these places")
    command.add_argument("--clear", action="store_true", help="remove them")
    return parser


def _add_strategies(command: argparse.ArgumentParser) -> None:
    """Add what a checkpoint is put through, in the order in which that is done."""
    add = command.add_argument
    add("--weights", action="store_true", help="the state dict alone")
    add("--drop-optimizer", action="store_true", help="all but the states of optimizers")
    add("--include", metavar="GLOB", action="append", help="these weights alone")
    add("--exclude", metavar="GLOB", action="append", help="not these weights")
    add("--strip-prefix", metavar="TEXT", help="of the weights' names")
    add("--add-prefix", metavar="TEXT", help="to the weights' names")
    add("--rename", metavar=("PATTERN", "NEW"), nargs=2, action="append", help="by a regex")
    add("--cast", metavar="DTYPE", help="floating-point weights to bfloat16, say")


def _strategies_of(parsed: argparse.Namespace, *, weights: bool) -> list[Any]:
    ours = anemoi_ckpt.strategies  # a user's own strategies.py in the working folder is another
    steps = [ours.weights] if weights else []
    steps += [ours.drop_optimizer] if parsed.drop_optimizer and not weights else []
    steps += [ours.include(*parsed.include)] if parsed.include else []
    steps += [ours.exclude(*parsed.exclude)] if parsed.exclude else []
    steps += [ours.strip_prefix(parsed.strip_prefix)] if parsed.strip_prefix else []
    steps += [ours.add_prefix(parsed.add_prefix)] if parsed.add_prefix else []
    steps += [ours.rename(*pair) for pair in parsed.rename or ()]
    return steps + ([ours.cast(_dtype_of(parsed.cast))] if parsed.cast else [])


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--cast takes a dtype of torch, such as bfloat16, not {name!r}")  # noqa: TRY004 - the text is wrong
    return dtype


def _policy(parsed: argparse.Namespace) -> dict[str, Any]:
    return {"retries": parsed.retries, "timeout": parsed.timeout}


def _as_json(value: Any) -> str:
    return json.dumps(plain(value), indent=2) + "\n"


def _shown(parsed: argparse.Namespace, result: Any) -> str:
    return _as_json(result.as_dict()) if parsed.json else f"{result}\n"


def _shown_place(parsed: argparse.Namespace, place: Any) -> str:
    """Show a place: as it is to other programs, and harmless to a terminal."""
    text = redact(str(place))
    if parsed.json:
        return _as_json(text)
    return f"{harmless(text) if sys.stdout.isatty() else text}\n"


# ── look ──────────────────────────────────────────────────────────────────────────────────────


def _run_ls(parsed: argparse.Namespace) -> _Answer:
    return _shown(parsed, anemoi_ckpt.find(parsed.pattern, **_policy(parsed))), 0


def _run_latest(parsed: argparse.Namespace) -> _Answer:
    return _shown_place(parsed, anemoi_ckpt.latest(parsed.pattern, **_policy(parsed))), 0


def _run_peek(parsed: argparse.Namespace) -> _Answer:
    found = anemoi_ckpt.peek(parsed.uri, **_policy(parsed))
    return _shown(parsed, found.tree() if parsed.tree else found), 0


def _run_plan(parsed: argparse.Namespace) -> _Answer:
    steps = _strategies_of(parsed, weights=parsed.weights)
    return _shown(parsed, anemoi_ckpt.plan(parsed.uri, *steps, **_policy(parsed))), 0


def _run_diff(parsed: argparse.Namespace) -> _Answer:
    steps = _strategies_of(parsed, weights=parsed.weights)
    found = anemoi_ckpt.diff(parsed.a, parsed.b, *steps, values=parsed.values, **_policy(parsed))
    return _shown(parsed, found), 0 if found.same else 1


def _run_verify(parsed: argparse.Namespace) -> _Answer:
    progress = False if parsed.quiet else None
    found = anemoi_ckpt.verify(
        parsed.uri, values=parsed.values, progress=progress, **_policy(parsed)
    )
    return _shown(parsed, found), 0 if found.ok else 1


def _run_metadata(parsed: argparse.Namespace) -> _Answer:
    return json.dumps(anemoi_ckpt.metadata(parsed.uri, **_policy(parsed)), indent=2) + "\n", 0


# ── copy ──────────────────────────────────────────────────────────────────────────────────────


def _run_copy(parsed: argparse.Namespace) -> _Answer:
    with tempfile.TemporaryDirectory() as folder:
        source: Any = parsed.uri
        if source == _PIPE:  # which cannot be read twice
            source = str(Path(folder, "standard input"))
            with Path(source).open("wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
        if parsed.to == _PIPE:
            target = Path(folder, "standard output")
            _copy(parsed, source, str(target))
            with target.open("rb") as written:
                shutil.copyfileobj(written, sys.stdout.buffer)
            return "", 0
        written_to = _copy(parsed, source, parsed.to)
    return _shown_place(parsed, written_to), 0


def _copy(parsed: argparse.Namespace, source: str, target: str) -> Any:
    """Copy a file as it is, or what is wanted of it; give the place that was written to."""
    transport = Transport(None, parsed.retries, parsed.timeout)
    progress = False if parsed.quiet else None
    place, to = locate(source, transport), parse_uri(target)
    folder = _folder_of(to)
    converted = is_safetensors(to) and not is_safetensors(place) and folder is None
    steps = _strategies_of(parsed, weights=parsed.weights or converted)
    if steps:
        wanted = anemoi_ckpt.load(place, *steps, progress=progress, **_policy(parsed))
        if not any(isinstance(leaf, torch.Tensor) for _, leaf in walk(wanted)):
            raise ValueError("nothing would be written: no tensor is left")
        if folder is not None:
            to = _made_beneath(folder, place.filename)
        anemoi_ckpt.save(wanted, to, metadata=place, **_policy(parsed))
    elif isinstance(to, LocalURI):
        return anemoi_ckpt.download(place, to.path, progress=progress, **_policy(parsed))
    else:
        with open_for_writing(to, transport) as stream:
            stream_pinned(place, stream, transport)
    return to


def _folder_of(to: URI) -> LocalURI | None:
    """Tell whether a folder is meant, rather than a file."""
    if isinstance(to, LocalURI) and (to.path.endswith(os.sep) or Path(to.path).is_dir()):
        return to
    return None


def _made_beneath(folder: LocalURI, name: str) -> URI:
    """Give a file's place in a folder, which is made if it is not there."""
    with explained_writing(folder):
        Path(folder.path).mkdir(parents=True, exist_ok=True)
    return parse_uri(Path(folder.path, name))


# ── cache ─────────────────────────────────────────────────────────────────────────────────────


def _usable(entry: CacheEntry) -> str:
    """Tell what a cached file is not good for."""
    if entry.file is None:
        return "  (not whole)"
    return "" if entry.offline else "  (not for offline)"


def _run_cache(parsed: argparse.Namespace) -> _Answer:
    entries = cache_entries(parsed.glob)
    if parsed.clear:
        entries = clear_cache(entries)
    if parsed.json:
        told = [
            {
                "place": each.place,
                "file": each.file and str(each.file),
                "size": each.size,
                "offline": each.offline,
            }
            for each in entries
        ]
        return _as_json(told), 0
    lines = [
        f"{sized(entry.size):>8}  {harmless(entry.place)}{_usable(entry)}"
        + ("" if parsed.clear else f"\n{'':>8}  {harmless(str(entry.file or entry.folder))}")
        for entry in entries
    ]
    total = sized(sum(entry.size for entry in entries))
    what = "removed" if parsed.clear else f"in {cache_folder()}"
    return "".join(f"{line}\n" for line in (*lines, f"{total:>8}  {what}")), 0
