"""What is no checkpoint, said as what it is: files of other kinds, archives with one in them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"-----BEGIN ",
        "a PEM file, such as a certificate",
        "give the checkpoint's own path",
    ),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "read it with h5py"),
    (b"GGUF", "a GGUF file", "give what it was converted from"),
    (b"\x93NUMPY", "an array of NumPy", "read it with numpy.load"),
    (b"CDF", "a NetCDF file", "read it with xarray"),
    (
        bytes(16),
        "zeros, at its beginning",
        "was its upload or download complete?",
    ),
)
_DER = re.compile(  # a sequence in a sequence, which begins with X.509's version 3 (RFC 5280 4.1)
    rb"0\x82..0(?:\x82..|\x81.)\xa0\x03\x02\x01\x02\x02", re.DOTALL
)
_CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".mdl")
_FEW = 3  # names that are told
_EXPORTED = ("archive_format", "serialized_exported_program.json")  # of torch 2.7, and before


def what_begins(start: bytes) -> tuple[str, str]:
    """Tell what a file is by its first bytes, and what to do."""
    for mark, what, remedy in _BEGINNINGS:
        if start.startswith(mark):
            return f"it is {what}", remedy
    if _DER.match(start):
        return "it is a certificate, in DER", "give the checkpoint's own path"
    return f"it begins with {start[:16]!r}, as no checkpoint does", "give a file of torch.save"


def what_zip(names: Iterable[str]) -> tuple[str, str]:
    """Tell what a zip archive is that is not torch's, by its members, and what to do."""
    names = [name for name in names if not name.endswith("/")]
    ends = {name.rpartition("/")[2] for name in names}
    if not ends.isdisjoint(_EXPORTED):
        remedy = "save its weights: torch.save(torch.export.load(path).state_dict, …)"
        return "it is a program of torch.export", remedy
    if names and all(name.endswith(".npy") for name in names):
        return "it is a zip archive of NumPy's arrays", "read it with numpy.load"
    kind = "an archive of TorchServe" if "MAR-INF/MANIFEST.json" in names else "a zip archive"
    within = _checkpoints_in(names)
    if not within:
        return "a zip archive without one data.pkl in it", "give a file that torch.save wrote"
    remedy = f"extract that, or give it open: zipfile.ZipFile(path).open({within[0]!r})"
    return f"it is {kind} with {_told(within)} in it", remedy


def what_tar(names: Iterable[str]) -> tuple[str, str]:
    """Tell what a tar archive is that is not torch's, by its members, and what to do."""
    within = _checkpoints_in(names)
    if not within:
        return "a tar archive, and not one of torch 0.1", "give a file that torch.save wrote"
    remedy = f"extract that, or give it open: tarfile.open(path).extractfile({within[0]!r})"
    return f"it is a tar archive with {_told(within)} in it", remedy


def _checkpoints_in(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(_CHECKPOINTS)]


def _told(names: list[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(f"{name!r:.100}" for name in names[:_FEW]) + more
