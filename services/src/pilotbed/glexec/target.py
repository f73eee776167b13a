"""What glexec does as the payload's account, with no rights but that account's: its proxy, and what it leaves behind.

Runs in children (``apart``); nothing here is ever root.
"""

# ruff: noqa: PTH104, PTH108, PTH116, PTH120
# Single system calls: between two looks at a path it may have become another file.

from __future__ import annotations

import ctypes
import os
import stat

from ..lean import suppress
from .policy import CLIENT_ERROR, Refusal
from .tree import KEYCTL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_IPC_RMID = 0
_CLEAR, _USER_KEYRING, _USER_SESSION_KEYRING = 7, -4, -5


def write_proxy(path: str, pem: bytes, sandbox: tuple[int, int] | None) -> bytes:
    """Put ``pem`` at ``path``; it replaces only a file of the account's. ``sandbox``: its (device, inode).

    Raises Refusal (201) where the path is not absolute or its directory is not the account's, /tmp's kind, or the
    sandbox.
    """
    if not path.startswith("/"):
        raise Refusal(CLIENT_ERROR, "GLEXEC_TARGET_PROXY must be an absolute path")
    owner, partial = os.getuid(), f"{path}.{os.getpid()}"
    try:
        above = os.stat(os.path.dirname(path))
        sticky = bool(above.st_mode & stat.S_ISVTX) and above.st_uid == 0
        alone = above.st_uid == owner and not above.st_mode & 0o002
        if not (alone or sticky or (above.st_dev, above.st_ino) == sandbox):
            raise Refusal(CLIENT_ERROR, f"GLEXEC_TARGET_PROXY: the directory of {path} must be the payload's alone")
        with suppress(FileNotFoundError):
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != owner:
                raise Refusal(CLIENT_ERROR, f"GLEXEC_TARGET_PROXY: {path} exists and is not the payload's")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(pem)
        os.rename(partial, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(partial)
        raise Refusal(CLIENT_ERROR, f"GLEXEC_TARGET_PROXY: {path}: {error.strerror}") from error
    return b""


def remove_proxy(path: str) -> bytes:
    """Remove the proxy at ``path``, if it is the account's."""
    with suppress(OSError):
        if os.lstat(path).st_uid == os.getuid():
            os.unlink(path)
    return b""


def sweep(directories: Iterable[str]) -> bytes:
    """Remove what the account has left in ``directories`` (of /tmp's kind), in System V IPC and in its keyrings.

    Only entries of the account's at the top: a directory of the caller's, with files of the account's in it, is the
    caller's business (mkgltempdir). Returns what could not be removed, in words.
    """
    owner, failed = os.getuid(), []
    for directory in directories:
        with suppress(FileNotFoundError), os.scandir(directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_uid == owner and not _remove(entry):
                        failed.append(entry.path)
    _remove_ipc(owner)
    if KEYCTL:
        for keyring in (_USER_KEYRING, _USER_SESSION_KEYRING):
            _libc.syscall(KEYCTL, _CLEAR, keyring)
    return ", ".join(failed).encode(errors="replace")[:1000]


def _remove(entry: os.DirEntry[str]) -> bool:
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry.path)
        return True
    os.chmod(entry.path, 0o700)  # noqa: PTH101 - the account may have closed directories to itself
    for directory, names, _ in os.walk(entry.path):
        for name in names:
            path = f"{directory}/{name}"
            if stat.S_ISDIR(os.lstat(path).st_mode):
                os.chmod(path, 0o700)  # noqa: PTH101
    import shutil

    shutil.rmtree(entry.path, ignore_errors=True)
    return not os.path.lexists(entry.path)


def _remove_ipc(owner: int) -> None:
    """Remove the account's shared memory, semaphores and message queues (/proc/sysvipc)."""
    for kind, key in (("shm", "shmid"), ("sem", "semid"), ("msg", "msqid")):
        with suppress(OSError), open(f"/proc/sysvipc/{kind}", encoding="ascii") as file:
            head, *lines = (line.split() for line in file)
            for line in lines:
                if int(line[head.index("uid")]) == owner:
                    number = int(line[head.index(key)])
                    arguments = (number, 0, _IPC_RMID) if kind == "sem" else (number, _IPC_RMID, None)
                    getattr(_libc, f"{kind}ctl")(*arguments)
