"""Sandbox hand-over, the one thing that gLExec did not have: GLEXEC_SANDBOX names a directory that the payload works in.

HTCondor's starter, which stays the pilot, makes the sandbox, fills it, and takes the output from it; the payload has another
uid. So the directory stays the pilot's but lets the target in; what is in it becomes the target's; at the end all of it
becomes the pilot's again.

Everything is done on descriptors that were opened without following links, and only on entries that belong to the one who
gives them away: neither side can make root change a file of a third. The target gets in by an ACL, not by the group: the
accounts of a pool share their group, so a group would let every user of the node into every sandbox. The sticky bit keeps
the pilot's own files safe from the payload.
"""

import contextlib
import ctypes
import fcntl
import os
import stat
from collections.abc import Callable, Iterator

from .policy import ACL_NAME, CLIENT_ERROR, SYSTEM_ERROR, Refusal, acl, is_standard_stream, stays_callers

_OPENAT2 = 437  # the same number on every architecture
_RESOLVE = 0x02 | 0x08  # RESOLVE_NO_MAGICLINKS | RESOLVE_BENEATH
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class Sandbox:
    """The sandbox of one call. It is opened with the caller's rights; the other methods need root."""

    def __init__(self, path: str, caller_uid: int) -> None:
        """Open the directory ``path``. Raises Refusal (201)."""
        if not path.startswith("/"):
            raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {path!r} is not an absolute path")
        try:
            self.fd = os.open(path, _DIRECTORY)
        except OSError as error:
            raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {path}: {error.strerror}") from error
        self.path = path
        self.found = os.fstat(self.fd)
        if self.found.st_uid != caller_uid:
            raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {path} does not belong to the caller")
        try:
            # A second call for the same sandbox would take it back from a running payload.
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refusal(CLIENT_ERROR, f"GLEXEC_SANDBOX: {path} is in use by another payload") from error

    def hand_out(self, target_uid: int, target_gid: int, keep: tuple[int, int] | None) -> None:
        """Give the caller's files to the target. ``keep``: (device, inode) of a file that stays, the source proxy.

        Raises Refusal (202) where the file system has no ACLs, and OSError.
        """
        caller = self.found.st_uid
        for directory, name, fd, found in self._walk(caller, target_uid):
            top = directory == self.fd
            if found.st_uid != caller or (found.st_dev, found.st_ino) == keep:
                continue
            if top and stays_callers(name):
                if is_standard_stream(name) and stat.S_ISREG(found.st_mode):
                    _set_acl(fd, acl(target_uid, 6, 6), self.path)
            elif stat.S_ISDIR(found.st_mode) or stat.S_ISLNK(found.st_mode) or _is_sole_file(found):
                os.chown(_handle(fd), target_uid, target_gid)
        os.fchmod(self.fd, 0o1700)
        _set_acl(self.fd, acl(target_uid, 7, 7), self.path)

    def hand_back(self, target_uid: int) -> list[str]:
        """Give all to the caller again and return what was withheld from it, in words.

        The starter will read these files with the pilot's rights and follow links, so a link that leaves the sandbox (to the
        pilot's proxy, say) is removed; so are pipes and devices, on which it would hang. No file keeps a set-uid bit: the
        payload's program would then run as the pilot. Safe to call twice.
        """
        caller_uid, caller_gid = self.found.st_uid, self.found.st_gid
        withheld: list[str] = []
        links: list[str] = []
        with contextlib.suppress(OSError):
            os.removexattr(self.fd, ACL_NAME)
        os.fchmod(self.fd, stat.S_IMODE(self.found.st_mode) & 0o700)
        for directory, name, fd, found in self._walk(target_uid, caller_uid):
            where = self._below(directory, name)
            mode = stat.S_IMODE(found.st_mode)
            if stat.S_ISLNK(found.st_mode):
                links.append(where)
            if directory == self.fd and is_standard_stream(name) and found.st_uid == caller_uid:
                with contextlib.suppress(OSError):
                    os.removexattr(_handle(fd), ACL_NAME)
                os.chmod(_handle(fd), 0o600)
            if found.st_uid != target_uid:
                continue
            if stat.S_ISDIR(found.st_mode):
                os.chmod(_handle(fd), (mode & 0o755) | 0o700)
                os.chown(_handle(fd), caller_uid, caller_gid)
            elif _is_sole_file(found):
                os.chmod(_handle(fd), mode & 0o755)
                os.chown(_handle(fd), caller_uid, caller_gid)
            elif stat.S_ISLNK(found.st_mode):
                os.chown(_handle(fd), caller_uid, caller_gid)
            elif stat.S_ISREG(found.st_mode):
                withheld.append(f"{where} (hard link)")
            else:
                os.unlink(name, dir_fd=directory)
                withheld.append(f"{where} (neither file nor directory)")
        # Only now, when the target can move nothing any more, is it certain where a link leads.
        for where in links:
            if not self._leads_inside(where):
                os.unlink(where, dir_fd=self.fd)
                withheld.append(f"{where} (link out of the sandbox)")
        return withheld

    def _walk(self, *owners: int) -> Iterator[tuple[int, str, int, os.stat_result]]:
        """Yield (directory's descriptor, name, O_PATH descriptor, status) of every entry, a directory before its content.

        Only directories of ``owners`` on the same file system are entered. Entries that vanish meanwhile are left out.
        """
        device = self.found.st_dev
        self._paths: dict[int, str] = {self.fd: ""}
        rest: list[Callable[[], int]] = [lambda: self.fd]
        while rest:
            try:
                directory = rest.pop()()
            except OSError:
                continue
            try:
                for name in os.listdir(directory):
                    try:
                        fd = os.open(name, _HANDLE, dir_fd=directory)
                    except FileNotFoundError:
                        continue
                    try:
                        found = os.fstat(fd)
                        if found.st_dev != device:
                            continue
                        yield directory, name, fd, found
                        if stat.S_ISDIR(found.st_mode) and found.st_uid in owners:
                            rest.append(self._later(fd, self._below(directory, name)))
                    finally:
                        os.close(fd)
            finally:
                if directory != self.fd:
                    del self._paths[directory]
                    os.close(directory)

    def _later(self, fd: int, path: str) -> Callable[[], int]:
        """Return a function that opens the directory behind ``fd`` again, for reading: the very one, not its name."""
        handle = os.dup(fd)

        def reopen() -> int:
            try:
                opened = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            finally:
                os.close(handle)
            self._paths[opened] = path
            return opened

        return reopen

    def _below(self, directory: int, name: str) -> str:
        above = self._paths[directory]
        return f"{above}/{name}" if above else name

    def _leads_inside(self, path: str) -> bool:
        """Tell whether the link ``path`` ends at something inside the sandbox."""
        how = (ctypes.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE)
        fd = _libc.syscall(_OPENAT2, self.fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if fd < 0:
            return False
        os.close(fd)
        return True


def _handle(fd: int) -> str:
    """Return a path to the very inode behind an O_PATH descriptor, on which chown and chmod do not work directly."""
    return f"/proc/self/fd/{fd}"


def _is_sole_file(found: os.stat_result) -> bool:
    """A regular file with one name: a second name may be anywhere, so such a file is not given away."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _set_acl(fd: int, value: bytes, path: str) -> None:
    try:
        os.setxattr(_handle(fd), ACL_NAME, value)
    except OSError as error:
        reason = f"GLEXEC_SANDBOX: the file system of {path} takes no POSIX ACL ({error.strerror}): use another scratch disk"
        raise Refusal(SYSTEM_ERROR, reason) from error
