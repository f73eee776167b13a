"""A node's logs of a time, as a compressed tar on standard output. By root, on the node.

``collect.py '{"since": S, "until": S, "files": [patterns]}'``, seconds since 1970: journal.json (journalctl's JSON, a
line an entry), the files that were written to since then, rotated ones, too, and about.json, which says what was cut.
"""

from __future__ import annotations

import glob
import io
import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import IO

#: Bytes of the journal, from its beginning on, and of a file, to its end.
JOURNAL, FILE = 64 << 20, 16 << 20


def add(archive: tarfile.TarFile, name: str, file: IO[bytes], size: int, changed: float) -> None:
    """Put an open file into the tar."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, int(changed), 0o600
    archive.addfile(member, file)


def journal(archive: tarfile.TarFile, since: float, until: float, cut: list[str]) -> None:
    """Put the journal of the time into the tar."""
    command = ["journalctl", "--quiet", "--no-pager", "--output=json", f"--since=@{int(since)}",
               f"--until=@{int(until) + 1}"]  # fmt: skip
    with tempfile.TemporaryFile(dir="/var/tmp") as kept:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            while (block := process.stdout.read(1 << 16)) and kept.tell() < JOURNAL:
                kept.write(block)
            if block:
                cut.append("journal.json")
                process.kill()
        size = kept.tell()
        kept.seek(0)
        add(archive, "journal.json", kept, size, until)


def written(patterns: Iterable[str], since: float) -> Iterator[tuple[str, float, int, bytes]]:
    """Yield name, time, size and end of the plain files of these patterns that were written to since then.

    Also of those with a further ending: rotated ones. A log's directory may be a daemon's: no link is followed.
    """
    for path in sorted({path for one in patterns for ending in ("", ".*") for path in glob.glob(one + ending)}):  # noqa: PTH207
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                about = os.fstat(file.fileno())
                if stat.S_ISREG(about.st_mode) and about.st_mtime >= since and about.st_size:
                    file.seek(max(0, about.st_size - FILE))
                    yield path, about.st_mtime, about.st_size, file.read(FILE)
        except OSError:
            continue  # a link, or rotated meanwhile


def main() -> None:
    """Write what was asked for."""
    asked, cut = json.loads(sys.argv[1]), list[str]()
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|gz", compresslevel=3) as archive:
        journal(archive, asked["since"], asked["until"], cut)
        for path, changed, size, end in written(asked["files"], asked["since"]):
            if len(end) < size:
                cut.append(path)
            add(archive, f"files{path}", io.BytesIO(end), len(end), changed)
        said = {"node": socket.gethostname(), "clock": time.time(), "since": asked["since"], "until": asked["until"],
                 "cut": cut}  # fmt: skip
        text = json.dumps(said, indent=1).encode()
        add(archive, "about.json", io.BytesIO(text), len(text), time.time())


if __name__ == "__main__":
    main()
