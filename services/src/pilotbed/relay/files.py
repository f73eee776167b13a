"""Files that outlive a crash of the host. Standard library only."""

import os
import secrets
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a file with mode 0600: readers see the old one or the whole new one, and after return it survives a crash.

    Raises:
        OSError: it could not be written; the old file stands.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
