"""A log of finished work that survives a kill: one file of JSON lines per process."""

import json
import os
import zlib
from pathlib import Path
from typing import IO

from studio.checks import json_text
from studio.errors import StudioError
from studio.files import locked
from studio.saving import make_folders

_CHECKSUM = "crc32"


class Records:
    """The file of records that one process appends to.

    Args:
        folder: shared by all processes; made where it is missing.
        index: the number of the process, which has its own file.

    Raises:
        StudioError: another run is writing there, or nothing can be written.
    """

    def __init__(self, folder: Path, index: int):
        try:
            make_folders(folder)
            self._file = open(folder / f"process-{index:05d}.jsonl", "a+b")
        except OSError as error:
            raise StudioError(f"{folder} cannot be written ({error.strerror}): choose another --out.") from error
        if not locked(self._file):
            self._file.close()
            raise StudioError(f"Another run is writing to {folder.parent}: wait for it, or stop it first.")
        self._cut_torn_line()

    def append(self, record: dict) -> None:
        """Write a record, a dict of JSON values, and return when it is on the disk."""
        self._file.write(json_text({**record, _CHECKSUM: _checksum(record)}).encode() + b"\n")
        sync(self._file)

    def close(self) -> None:
        self._file.close()

    def _cut_torn_line(self):
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)


def read_records(folder: Path) -> tuple[list[dict], int]:
    """The records of a folder, oldest first in each file.

    Args:
        folder: a `Path`; where there is none there are no records.

    Returns:
        The records, dicts, and how many lines are none: a disk or an editor damaged them, and what they recorded counts
        as not done.
    """
    records, damaged = [], 0
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_bytes().split(b"\n")[:-1] if file.is_file() else ():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and record.pop(_CHECKSUM, None) == _checksum(record):
                records.append(record)
            else:
                damaged += 1
    return records, damaged


def _checksum(record):
    """CRC-32 of a record."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def sync(file: IO) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())
