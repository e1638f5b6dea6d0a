"""A record of an archive is replaced, and all others stay where they are.

Behind the last record that stays come the new one and a new directory (APPNOTE 4.3.6): the weights
are neither read nor written anew, if the file system lets two files share what they have in common.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import BinaryIO

from _anemoi_ckpt.errors import CorruptError
from _anemoi_ckpt.formats.torch_zip import read_directory
from _anemoi_ckpt.places import open_writer
from _anemoi_ckpt.places.local import LocalURI


def replace_record(place: LocalURI, name: str, data: bytes) -> None:
    """Replace a record of an archive on a disk, all or nothing.

    Args:
        place: where the archive is.
        name: the record's.
        data: what it holds from now on.

    Raises:
        CorruptError: the archive has no readable directory, or no such record.
        CheckpointError: the file cannot be written to.
    """
    path = Path(place.path)
    with path.open("rb") as source, open_writer(place) as stream:
        directory = read_directory(place, source)
        old = directory.NameToInfo.get(name)
        if old is None:
            raise CorruptError(place, f"there is no record {name} any more", "look into it again")
        kept = [info for info in directory.filelist if info is not old]
        is_last = all(info.header_offset < old.header_offset for info in kept)
        end = old.header_offset if is_last else directory.start_dir
        _copy(source, stream, end)
        with zipfile.ZipFile(stream, "w") as written:  # which goes on from here
            written.filelist = kept
            written.writestr(zipfile.ZipInfo(name), data)
        Path(stream.name).chmod(path.stat().st_mode)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Copy the first bytes of a file; the two share them where the file system can do that."""
    source.seek(0)
    done = 0
    try:
        while done < count:
            copied = os.copy_file_range(source.fileno(), target.fileno(), count - done, done, done)
            done += copied or count  # none where the file became shorter meanwhile
    except (AttributeError, OSError):  # only Linux has it, and not between all file systems
        target.seek(0)
        shutil.copyfileobj(source, target)
    target.truncate(count)
    target.seek(count)
