"""Files that are replaced in one step. Standard library only: the agent runs on workers that have nothing else."""

import os
import secrets
from pathlib import Path


def replace_file(path: Path, content: bytes | str, mode: int, *, durable: bool = False) -> None:
    """Replace ``path`` by ``content``: readers see the old file or the whole new one, never with more than ``mode``.

    Args:
        path: the file; its directory is there.
        content: what it holds then; text is written as UTF-8.
        mode: its permissions, whatever the umask.
        durable: after return it survives a crash of the host.

    Raises:
        OSError: it could not be written; the old file stands.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(descriptor)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if durable:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
