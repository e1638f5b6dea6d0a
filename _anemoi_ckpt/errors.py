"""What can go wrong with a checkpoint."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

UNPLACED = "the checkpoint"  # what an error of a strategy names: it does not know the place


class CheckpointError(Exception):
    """A checkpoint could not be loaded: says where, what is wrong and what to do.

    Pickles (to travel between ranks and workers), and shows no secret. What a name has of escape
    sequences is told, and does nothing to a terminal.

    >>> raise CheckpointError("s3://b/k?sig=abc", "it is odd", "try again")
    Traceback (most recent call last):
    anemoi_ckpt.CheckpointError: s3://b/k?sig=***: it is odd; try again
    """

    def __init__(self, place: object, problem: str, remedy: str) -> None:
        """Take the place as it was given, what is wrong with it, and what to do next."""
        self.problem, self.remedy = harmless(redact(problem), keep="\n"), remedy
        self.name_place(place)

    def name_place(self, place: object) -> None:
        """Say where the checkpoint is; strategies do not know, and `load` does."""
        self.place = harmless(redact(str(place)))
        end = "\n  " if "\n" in self.problem else "; "
        self.args = (f"{self.place}: {self.problem}{end}{self.remedy}",)

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the three parts, not from the one message; notes travel, too."""
        return type(self), (self.place, self.problem, self.remedy), self.__dict__


class InvalidURIError(CheckpointError, ValueError):
    """The text names no place that a checkpoint could be at."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such object (or bucket, folder, host's path)."""

    lacks: str = ""  # "object" or "bucket", where the place tells which of them is not there


class AccessDeniedError(CheckpointError, PermissionError):
    """The place refused: no credentials, wrong ones, or no permission."""


class UnreachableError(CheckpointError, ConnectionError):
    """The place did not answer, or not wholly, after all attempts."""

    retry_after: float = 0.0  # seconds that the server asks to wait
    progressed: bool = False  # whether the attempt brought bytes before it failed
    lasting: bool = False  # whether another attempt would fail like it


class ChangedError(CheckpointError, OSError):
    """The object was replaced while it was read."""


class CorruptError(CheckpointError, ValueError):
    """Bytes are missing or wrong."""


class NotACheckpointError(CheckpointError, ValueError):
    """The file is there, but torch did not write it."""


class UnsafeCheckpointError(CheckpointError, ValueError):
    """The checkpoint names functions of ``os`` or ``sys``, or takes memory without end."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint does not fit the model, or what a strategy needs of it."""


def refusal(kind: type[Exception], place: object, problem: str, remedy: str) -> MismatchError:
    """Make a MismatchError that is of the built-in kind of its cause, too.

    >>> isinstance(refusal(KeyError, "a.ckpt", "it has no w", "add it"), KeyError)
    True
    """
    known: Iterator[Any] = (each for each in kind.__mro__ if each.__module__ == "builtins")
    built_in = next(each for each in known if not issubclass(each, BaseExceptionGroup))
    return _refusal_of(built_in)(place, problem, remedy)


@functools.cache
def _refusal_of(kind: type[Exception]) -> type[MismatchError]:
    if issubclass(MismatchError, kind):
        return MismatchError

    class RefusalError(MismatchError, kind):  # type: ignore[misc, valid-type] # a base is a value
        __str__ = Exception.__str__  # that of a KeyError is a repr

        def __reduce__(self) -> tuple[Any, ...]:
            return refusal, (kind, self.place, self.problem, self.remedy), self.__dict__

    RefusalError.__name__ = RefusalError.__qualname__ = MismatchError.__name__
    RefusalError.__module__ = MismatchError.__module__
    return RefusalError


class NoDictError(MismatchError, TypeError):
    """A strategy takes a dict, and this checkpoint is something else."""


class MissingPackageError(CheckpointError, ImportError):
    """The place needs a package that is not installed."""


# Bounded: what is looked through may be what a hostile file says.
USERINFO = re.compile(
    r"(?i)\b(?!abfss?:|wasbs?:)([a-z][a-z0-9+.-]{0,20}://)"  # not Azure's container@account
    r"(?:[^/\s]{0,999}|(?!arn:)[^/\s:\[]{1,999}:(?!\d*(?:[/?#]|$))\S{0,999})@"  # or with a slash
)
_VALUE = re.compile(
    r"(?i)(?<![\w-])([\w.-]{0,40}(?:access_?id|auth|credential|delegation|jwt|key|passw|pwd|secret|session|sig"
    r"|token)[\w-]{0,40}(?:=|%3D))[^&;\s'\"]+"
)
_HEADER = re.compile(r"(?i)(header (?:value|name):? |authorization['\"]?: *|\bBearer )(?!\*).+")


def redact(text: str) -> str:
    """Cut out of a text what gives access: users and passwords in URLs, signatures, tokens, keys.

    >>> redact("https://me:1234@host/a.ckpt?versionId=3&X-Amz-Signature=56ab")
    'https://***@host/a.ckpt?versionId=3&X-Amz-Signature=***'
    """
    for pattern, hidden in ((USERINFO, r"\1***@"), (_VALUE, r"\1***"), (_HEADER, r"\1***")):
        text = pattern.sub(hidden, text)
    return text


def harmless(text: str, keep: str = "") -> str:
    r"""Write out what a terminal would act upon: control characters, and what reorders a line.

    Names in checkpoints and in stores may have them. `str.isprintable` tells which they are.

    Args:
        text: what is to be shown.
        keep: characters that stay as they are.

    >>> print(harmless("layer\x1b[2J\u202e.weight"))
    layer\x1b[2J\u202e.weight
    """
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
    return "".join(shown)
