"""The entries of a state dict get other names.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from _anemoi_ckpt.anatomy import like, versions_of, with_versions
from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.variables import few


def rename_entries(state_dict: Mapping[str, Any], new_name: Callable[[str], str]) -> dict[str, Any]:
    """Rename each entry of a state dict, and the versions of modules in its ``_metadata``.

    A key that is no text stays as it is.

    Raises:
        MismatchError: two names would become one.
    """
    old_names: dict[str, str] = {}  # by new name
    clashes = []
    for name in state_dict:
        new = new_name(name) if isinstance(name, str) else name
        if new in old_names:
            clashes.append(f"{old_names[new]} and {name} both become {new}")
        old_names[new] = name
    if clashes:
        remedy = "leave one of each out with exclude before"
        raise MismatchError(UNPLACED, f"names clash: {few(clashes)}", remedy)
    renamed = like(state_dict, {new: state_dict[old] for new, old in old_names.items()})
    # torch keeps a module's version under the module's path. The path is the prefix of the names of
    # its entries, so it is renamed as these are. If an inner module takes the path of the module
    # around it (strip_prefix), its version replaces the outer one, because it comes later.
    versions = {
        new_name(f"{path}." if path else "").removesuffix("."): version
        for path, version in versions_of(state_dict).items()
    }
    return with_versions(renamed, versions)
