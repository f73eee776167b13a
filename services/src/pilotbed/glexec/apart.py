"""Work under another account: in a child that has become that account for good, and gives back bytes or a descriptor.

Root itself opens no path that a user named, and parses no byte that a user wrote.
"""

from __future__ import annotations

import os
import select
import sys
import time

from ..lean import signal, socket, suppress
from .policy import AUTHORISATION_ERROR, CLIENT_ERROR, SYSTEM_ERROR, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pwd
    from collections.abc import Callable, Collection

PATIENCE = 30.0  # seconds; a mapping takes 0.02
_CHANNEL = 3  # the child's only descriptor above its standard ones
_LARGEST = 1 << 21  # bytes
_DONE = b"\0"  # first byte of an answer; anything else is the code of a Refusal, whose reason follows


def run_as(
    account: pwd.struct_passwd, work: Callable[[], bytes], groups: Collection[int] = (), patience: float = PATIENCE
) -> bytes:
    """Return what ``work`` returns when it runs as ``account`` with the supplementary ``groups`` (gids).

    Raises Refusal: what ``work`` raised of it, else 202 where it failed, was killed, or took longer than ``patience``
    seconds. Nothing that comes back can be trusted more than the account.
    """
    return _run(account, groups, lambda channel: channel.sendall(_DONE + work()), patience)[0]


def open_as(account: pwd.struct_passwd, path: str, flags: int) -> int:
    """Return a descriptor of ``path``, opened with the rights of ``account`` and all its groups.

    Links are not followed, devices and pipes not waited for. Raises FileNotFoundError, PermissionError or another
    OSError with the reason, or Refusal (202).
    """

    def work(channel: socket.socket) -> None:
        try:
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            channel.sendall(_DONE + str(error.errno).encode())
        else:
            channel.sendmsg([_DONE], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))])

    failed, fd = _run(account, os.getgrouplist(account.pw_name, account.pw_gid), work, PATIENCE)
    if fd < 0:
        number = int(failed)
        raise OSError(number, os.strerror(number), path)
    return fd


def _run(
    account: pwd.struct_passwd, groups: Collection[int], work: Callable[[socket.socket], None], patience: float
) -> tuple[bytes, int]:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.dup2(theirs.fileno(), _CHANNEL)
            os.closerange(_CHANNEL + 1, 0x7FFFFFFF)
            channel = socket.socket(fileno=_CHANNEL)
            try:
                become(account.pw_uid, account.pw_gid, groups)
                work(channel)
            except Refusal as refusal:
                channel.sendall(bytes([refusal.code]) + refusal.reason.encode(errors="replace"))
            except BaseException as error:
                channel.sendall(bytes([SYSTEM_ERROR]) + f"{type(error).__name__}: {error}".encode(errors="replace"))
        os._exit(0)
    theirs.close()
    try:
        answer, fd = _received(ours, time.monotonic() + patience)
    finally:
        ours.close()
        os.kill(child, signal.SIGKILL)  # nobody else waits for it: its pid is still its own
        os.waitpid(child, 0)
    if answer[:1] != _DONE:
        if fd >= 0:
            os.close(fd)
        if answer and answer[0] in {CLIENT_ERROR, SYSTEM_ERROR, AUTHORISATION_ERROR}:
            raise Refusal(answer[0], answer[1:513].decode(errors="replace"))
        raise Refusal(SYSTEM_ERROR, f"the part for {account.pw_name} was killed, or did not answer in time")
    return answer[1:], fd


def _received(channel: socket.socket, deadline: float) -> tuple[bytes, int]:
    """Return what arrives until the other end is closed, and a descriptor or -1; nothing once ``deadline`` is over."""
    answer, found = b"", -1
    while len(answer) <= _LARGEST:
        if not select.select([channel], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return b"", found
        part, messages, _, _ = channel.recvmsg(1 << 16, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in messages:
            if (level, kind, len(data)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, 4):
                found = int.from_bytes(data, sys.byteorder)
        if not part:
            return answer, found
        answer += part
    return b"", found


def become(uid: int, gid: int, groups: Collection[int]) -> None:
    """Take another identity for good. Raises OSError."""
    os.setgroups(list(groups))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
