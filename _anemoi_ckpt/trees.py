"""What `Contents.tree` gives: the modules of a checkpoint, and what their tensors take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from attrs import frozen

from _anemoi_ckpt.pictures import Branch, as_text, as_tree, bounded, grown, joined, page
from _anemoi_ckpt.tables import Table, plain, plain_fields, sized


@frozen
class TensorInfo:
    """One tensor of a checkpoint."""

    key: str  # what it stands under at the top of the checkpoint; "" where that is a tensor itself
    name: str  # beneath that: of a state dict, the parameter's or buffer's
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int  # of its values; tied ones share them
    tied: str = ""  # the first tensor that has the same values at the same place

    @property
    def path(self) -> str:
        """Key and name, with dots between their parts."""
        return ".".join(filter(None, (self.key, self.name)))

    @property
    def described(self) -> str:
        """Shape, dtype and size, as people read them."""
        dtype = str(self.dtype).removeprefix("torch.")
        tie = f", tied to {self.tied}" if self.tied else ""
        return f"{self.shape} {dtype} {sized(self.bytes)}{tie}"


plain.register(TensorInfo, plain_fields)


@frozen(repr=False, eq=False)
class Tree(Table):
    """A module of a checkpoint, or all of it. Prints as a tree, and unfolds in notebooks."""

    name: str  # within the module above it; "" of the whole checkpoint
    bytes: int  # of its tensors, of tied ones once
    values: int  # numbers in them, likewise
    tensors: tuple[TensorInfo, ...]  # that have just this name: of a module, none
    children: Mapping[str, Tree]

    def __getitem__(self, path: str) -> Tree:
        """Give what is beneath, by its path: ``tree["state_dict.encoder"]``."""
        whole, found = self, self
        for part in path.split("."):
            if part not in found.children:
                near = ", ".join(list(found.children)[:3])
                raise KeyError(f"there is no {path!r} in {whole.name or 'the tree'}: but {near}")
            found = found.children[part]
        return found

    def _rows(self) -> list[tuple[str, str]]:
        return [("", line) for line in as_text([bounded(joined(branch_of(self)))])]

    def __repr__(self) -> str:
        """Draw the tree as text."""
        return "\n".join(line for _, line in self._rows())

    def _repr_html_(self) -> str:
        """Draw the tree in a notebook."""
        return page(as_tree(branch_of(self)))


def tree_of(tensors: Iterable[TensorInfo]) -> Tree:
    """Arrange tensors by module."""
    return grown(((each.path, each) for each in tensors), _summed)


def _summed(name: str, own: Sequence[TensorInfo], below: Sequence[Tree]) -> Tree:
    counted = [each for each in own if not each.tied]
    return Tree(
        name,
        bytes=sum(each.bytes for each in counted) + sum(each.bytes for each in below),
        values=sum(each.bytes // each.dtype.itemsize for each in counted)
        + sum(each.values for each in below),
        tensors=tuple(own),
        children={each.name: each for each in below},
    )


def branch_of(tree: Tree, whole: int = 0) -> Branch:
    """Draw a tree: a bar is a module's share of all bytes."""
    whole = whole or tree.bytes or 1
    rows = [Branch(tree.name, each.described, each.bytes / whole) for each in tree.tensors]
    below = [branch_of(each, whole) for each in tree.children.values()]
    if len(rows) == 1 and not below:
        return rows[0]
    note = f"{sized(tree.bytes)}, {tree.values:,} values"
    return Branch(tree.name, note, tree.bytes / whole, [*rows, *below])
