"""The grid's own command line tools for proxies: run one, and say what went wrong."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pilotbed.service import read_file

#: Seconds that a tool may take; each talks to one server once.
DEADLINE = 60


class ToolError(Exception):
    """A tool that failed; the message holds its name and its last lines, never a key."""


def own_copy(path: Path, directory: Path) -> Path:
    """Copy a key or proxy into ``directory`` with mode 0600 and return where it is.

    systemd hands credentials over with an access list (0440): the grid's tools call such a key insecure and say only
    "Couldn't find valid credentials to generate a proxy".

    Raises:
        OSError: it cannot be read.
    """
    copy = directory / path.name
    with os.fdopen(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(read_file(path))
    return copy


def run(command: Sequence[str | Path], environment: Mapping[str, str | Path]) -> str:
    """Run ``command`` with ``environment`` added to ours and return what it printed.

    Raises:
        ToolError: it is missing, failed or took longer than DEADLINE.
    """
    name = str(command[0])
    try:
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | {key: str(value) for key, value in environment.items()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(f"{name}: {error}") from error
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip(" .")]
        raise ToolError(f"{name} failed ({done.returncode}): {'; '.join(said[-4:]) or 'it says nothing'}")
    return done.stdout
