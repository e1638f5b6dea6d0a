"""When a model's steps in time are: of its input before the forecast begins, of its output after.

Anemoi's metadata tell it, by dataset, in ``metadata_inference.{dataset}.timesteps``: the positions
of the dates that are read and predicted, and the time from one position to the next
(anemoi/training/tasks/base.py, anemoi-training 0.17).

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from _anemoi_ckpt.describing import metadata_of
from _anemoi_ckpt.variables import as_mapping

Times = Mapping[str, str]  # by dataset, as they are printed

_STEP = re.compile(r"(\d+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_READ, _PREDICTED = "input_relative_date_indices", "output_relative_date_indices"


def read_times(checkpoint: Any) -> dict[str, str]:
    """Read when the steps of a checkpoint or a model are, by dataset, as far as it tells.

    >>> steps = {"input_relative_date_indices": [0, 1], "output_relative_date_indices": [2]}
    >>> facts = {"metadata_inference": {"data": {"timesteps": {**steps, "timestep": "6h"}}}}
    >>> read_times({"hyper_parameters": {"metadata": {"dataset": {}, **facts}}})
    {'data': '-6h, 0h to +6h'}
    """
    sections = as_mapping(metadata_of(checkpoint).get("metadata_inference"))
    times = {
        str(dataset): _described(section["timesteps"])
        for dataset, section in sections.items()
        if isinstance(section, Mapping) and isinstance(section.get("timesteps"), Mapping)
    }
    return {dataset: described for dataset, described in times.items() if described}


def _described(timesteps: Mapping[str, Any]) -> str:
    """Describe steps; empty if they are unknown."""
    match = _STEP.fullmatch(str(timesteps.get("timestep", "")).lower())
    read, predicted = (_positions(timesteps.get(name)) for name in (_READ, _PREDICTED))
    if match is None or not (read and predicted):
        return ""
    seconds = int(match[1]) * _SECONDS[match[2]]
    sides = (
        ", ".join(_offset((place - read[-1]) * seconds) for place in places)
        for places in (read, predicted)
    )
    return " to ".join(sides)


def _positions(value: Any) -> list[int]:
    """Give a list of positions, inert or not; an empty one of anything else."""
    items = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    return items if all(isinstance(each, int) for each in items) else []


def _offset(seconds: int) -> str:
    """Write an offset in the largest unit that it is a whole number of, up to hours.

    >>> _offset(-21600), _offset(5400), _offset(0)
    ('-6h', '+90m', '0h')
    """
    unit = next(unit for unit in "hms" if seconds % _SECONDS[unit] == 0)
    return f"{seconds // _SECONDS[unit]:+d}{unit}".replace("+0", "0")


def other_times(theirs: Times, own: Times) -> dict[str, tuple[str, str]]:
    """Give when the steps are on both sides, for the datasets where that differs.

    >>> other_times({"data": "0h to +6h"}, {"data": "0h to +3h", "more": "0h to +6h"})
    {'data': ('0h to +6h', '0h to +3h')}
    """
    return {
        dataset: (theirs[dataset], times)
        for dataset, times in own.items()
        if theirs.get(dataset, times) != times
    }
