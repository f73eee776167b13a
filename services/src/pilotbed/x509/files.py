"""Files that are read again only when they have changed."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

T = TypeVar("T")


class ParsedFiles:
    """What was parsed from files, kept as long as the files stay the same (by time, size and inode)."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], object]] = {}

    def load(self, path: Path, parse: Callable[[bytes], T]) -> T | None:
        """The parsed content of `path`, which is looked at on every call; None where there is no such file.

        Args:
            path: always given with the same `parse`.
            parse: makes the result from the file's bytes.
        Raises:
            OSError: the file cannot be read.
            Exception: whatever `parse` raises.
        """
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev)
            known = self._known.get(path)
            if known is None or known[0] != stamp:
                known = self._known[path] = (stamp, parse(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            self._known.pop(path, None)
            return None
        return cast(T, known[1])
