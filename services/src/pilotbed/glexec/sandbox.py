"""Sandbox hand-over, the one thing that gLExec did not have: GLEXEC_SANDBOX names a directory for the payload to work
in.

HTCondor's starter, which stays the pilot, makes the sandbox, fills it, and takes the output from it; the payload has
another uid. So the directory stays the pilot's but lets the target in; what is in it becomes the target's; at the end
all of it becomes the pilot's again.

Everything is done on descriptors that were opened without following links, and only on entries that belong to the one
who gives them away: neither side can make root change a file of a third. The target gets in by an ACL, not by the
group: the accounts of a pool share their group, so a group would let every user of the node into every sandbox. The
sticky bit keeps the pilot's own files safe from the payload.
"""

# ruff: noqa: PTH101, PTH208

from __future__ import annotations

import ctypes
import fcntl
import os
import stat

from ..lean import suppress
from .policy import ACL_NAME, CLIENT_ERROR, SYSTEM_ERROR, Refusal, acl, is_standard_stream, stays_callers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_OPENAT2 = 437  # the same number on every architecture
_BELOW = 0x08 | 0x02  # RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS
_STRICTLY_BELOW = _BELOW | 0x04 | 0x01  # RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class Sandbox:
    """The sandbox of one call. All needs root but opening it, which is done with the caller's rights."""

    def __init__(self, path: str, fd: int, caller_uid: int) -> None:
        """Take the directory ``path``, which was opened as ``fd`` with the caller's rights. Raises Refusal (201)."""
        self.path, self.fd = path, fd
        self.found = os.fstat(fd)
        self.mode = stat.S_IMODE(self.found.st_mode)
        if self.found.st_uid != caller_uid:
            raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {path} does not belong to the caller")
        try:
            # A second call for the same sandbox would take it back from a running payload.
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {path} is in use by another payload") from error

    def hand_out(self, target_uid: int, target_gid: int, keep: Collection[tuple[int, int]], proxy: str) -> None:
        """Give the caller's files to the target. ``keep``: (device, inode) of files that stay, the proxies; so does
        ``proxy``, by its path, as the caller may just have replaced it.

        Raises Refusal (202) where the file system has no ACLs, and OSError.
        """
        caller = self.found.st_uid
        for above, name, fd, found in self._walk(caller, target_uid):
            if found.st_uid != caller or (found.st_dev, found.st_ino) in keep:
                continue
            if f"{self.path}/{_join(above, name)}" == proxy:
                continue
            if not above and stays_callers(name):
                if is_standard_stream(name) and stat.S_ISREG(found.st_mode):
                    _set_acl(fd, acl(target_uid, 6, 6), self.path)
            elif _may_change_hands(found):
                os.chown(_handle(fd), target_uid, target_gid)
        os.fchmod(self.fd, 0o1700)
        _set_acl(self.fd, acl(target_uid, 7, 7), self.path)

    def hand_back(self, target_uid: int) -> list[str]:
        """Give all to the caller again and return what was withheld from it, in words. Safe to call twice.

        The starter will read these files with the pilot's rights and follow links, so a link that leaves the sandbox
        (to the pilot's proxy, say) is removed; so are pipes and devices, on which it would hang. No file keeps a
        set-uid bit: the payload's program would then run as the pilot.
        """
        linked: dict[int, list[str]] = {}  # regular files with several names, by inode
        links: list[str] = []
        unwanted: dict[str, str] = {}
        _remove_acl(self.fd, self.mode & 0o755)
        for above, name, fd, found in self._walk(target_uid, self.found.st_uid):
            where = _join(above, name)
            if stat.S_ISLNK(found.st_mode):
                links.append(where)
            if found.st_uid == self.found.st_uid and not above and is_standard_stream(name):
                _remove_acl(fd, 0o600)
            elif found.st_uid != target_uid:
                continue
            elif _may_change_hands(found):
                self._return(fd, found)
            elif stat.S_ISREG(found.st_mode):
                linked.setdefault(found.st_ino, []).append(where)
            else:
                unwanted[where] = "neither file nor directory"
        # Only now, when the target can move nothing any more, is it certain where a link leads and what has which
        # names.
        unwanted |= {where: "link out of the sandbox" for where in links if not self._leads_inside(where)}
        for where in unwanted:
            with suppress(OSError):
                os.unlink(where, dir_fd=self.fd)
        for names in linked.values():
            if not self._return_linked(names, target_uid):
                unwanted |= dict.fromkeys(names, "hard link from outside")
        return [f"{where} ({why})" for where, why in unwanted.items()]

    def _return_linked(self, names: list[str], target_uid: int) -> bool:
        """Return a file if all its names are in the sandbox, at ``names``; tell whether that was so."""
        fd = self._open(names[0], os.O_PATH | os.O_NOFOLLOW, _STRICTLY_BELOW)
        if fd < 0:
            return False
        try:
            found = os.fstat(fd)
            mine = stat.S_ISREG(found.st_mode) and found.st_uid == target_uid and found.st_nlink == len(names)
            if mine:
                self._return(fd, found)
            return mine
        finally:
            os.close(fd)

    def _return(self, fd: int, found: os.stat_result) -> None:
        """Make the caller the owner, without set-uid bits and with nobody else's right to write."""
        if not stat.S_ISLNK(found.st_mode):
            os.chmod(_handle(fd), stat.S_IMODE(found.st_mode) & 0o755 | (0o700 if stat.S_ISDIR(found.st_mode) else 0))
        os.chown(_handle(fd), self.found.st_uid, self.found.st_gid)

    def _walk(self, *owners: int) -> Iterator[tuple[str, str, int, os.stat_result]]:
        """Yield (its directory's path, name, O_PATH descriptor, status) of every entry, a directory before its
        content.

        Paths are relative to the sandbox, whose own is empty. Only directories of ``owners`` on the same file system
        are entered; whichever directory below the sandbox a path leads to, it may be walked. An entry that vanishes
        meanwhile, or whose path is longer than the kernel takes, is left out.
        """
        rest = [""]
        while rest:
            path = rest.pop()
            directory = self._open(path or ".", os.O_RDONLY | os.O_DIRECTORY, _STRICTLY_BELOW)
            if directory < 0:
                continue
            try:
                for name in os.listdir(directory):
                    # Not by st_dev: on overlayfs a file's is not its directory's.
                    fd = self._open(name, _HANDLE, _STRICTLY_BELOW, directory)
                    if fd < 0:
                        continue
                    try:
                        found = os.fstat(fd)
                        yield path, name, fd, found
                        if stat.S_ISDIR(found.st_mode) and found.st_uid in owners:
                            rest.append(_join(path, name))
                    finally:
                        os.close(fd)
            finally:
                os.close(directory)

    def _open(self, path: str, flags: int, resolve: int, directory: int | None = None) -> int:
        """Open ``path`` in the sandbox, or in a ``directory`` of it, by openat2(2); return -1 where that fails."""
        how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, resolve)
        return int(_libc.syscall(
            _OPENAT2, self.fd if directory is None else directory, os.fsencode(path), ctypes.byref(how),
            ctypes.c_size_t(24),
        ))  # fmt: skip

    def _leads_inside(self, path: str) -> bool:
        """Tell whether the link ``path`` ends at something inside the sandbox."""
        fd = self._open(path, os.O_PATH, _BELOW)
        if fd < 0:
            return False
        os.close(fd)
        return True


def _join(above: str, name: str) -> str:
    return f"{above}/{name}" if above else name


def _handle(fd: int) -> str:
    """Return a path to the very inode behind an O_PATH descriptor, on which chown and chmod do not work directly."""
    return f"/proc/self/fd/{fd}"


def _may_change_hands(found: os.stat_result) -> bool:
    """Directories, links, and regular files with one name: a second name may be anywhere, so it is not given away."""
    mode = found.st_mode
    return stat.S_ISDIR(mode) or stat.S_ISLNK(mode) or (stat.S_ISREG(mode) and found.st_nlink == 1)


def _remove_acl(fd: int, mode: int) -> None:
    with suppress(OSError):  # there is none
        os.removexattr(_handle(fd), ACL_NAME)
    os.chmod(_handle(fd), mode)


def _set_acl(fd: int, value: bytes, path: str) -> None:
    try:
        os.setxattr(_handle(fd), ACL_NAME, value)
    except OSError as error:
        reason = f"GLEXEC_SANDBOX: the file system of {path} takes no POSIX ACL ({error.strerror}): use another disk"
        raise Refusal(SYSTEM_ERROR, reason) from error
