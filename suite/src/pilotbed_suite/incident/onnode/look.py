"""What users run on this worker under glexec: processes, files, and the certificates in them. By root, on the node.

``look.py '{"dns": [...], "paths": [...]}'`` prints JSON; of the proxies among the files the SHA-256 of each
certificate, never a key. ``paths`` are files to look at besides. It ends after SECONDS, with what it has.
"""

# ruff: noqa: PTH115, PTH116, PTH118, PTH208 - paths of users' and of /proc, as bytes or not

from __future__ import annotations

import base64
import hashlib
import json
import os
import pwd
import re
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

SECONDS, FILES, LARGEST = 15, 5000, 16 << 20
SHARED = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 (looked at, not written)
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)
_end = time.monotonic() + SECONDS


def certificates(content: bytes) -> list[str]:
    """Return the SHA-256 of every certificate in a file's content."""
    found = []
    for body in _CERTIFICATE.findall(content):
        try:
            found.append(hashlib.sha256(base64.b64decode(body)).hexdigest())
        except ValueError:
            continue
    return found


def described(path: str) -> dict[str, Any]:
    """Return what there is to know of a file; no link is followed and nothing but a plain file is opened."""
    about = os.lstat(path)
    told: dict[str, Any] = {"path": path, "uid": about.st_uid, "mode": stat.filemode(about.st_mode),
                            "size": about.st_size, "changed": about.st_mtime}  # fmt: skip
    if stat.S_ISLNK(about.st_mode):
        told["leads to"] = os.readlink(path)
    elif stat.S_ISREG(about.st_mode) and about.st_size <= LARGEST:
        # A user can put a pipe in its place meanwhile.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            content = file.read(LARGEST)
        told["sha256"] = hashlib.sha256(content).hexdigest()
        if names := certificates(content):
            told["certificates"] = names
    return told


def below(top: str, uid: int | None) -> Iterator[str]:
    """Yield the paths below a directory, of ``uid`` or, if that is None, all; it stays on the file system."""
    try:
        device = os.lstat(top).st_dev
    except OSError:
        return
    for place, directories, names in os.walk(top):
        for name in [*directories, *names]:
            path = os.path.join(place, name)
            try:
                about = os.lstat(path)
            except OSError:
                continue
            if about.st_dev != device:
                if name in directories:
                    directories.remove(name)
            elif uid in (None, about.st_uid):
                yield path


def processes(uid: int) -> list[dict[str, Any]]:
    """Return the processes of an account."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid != uid:
                continue
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                line = file.read(4096).replace(b"\0", b" ").strip()
            found.append({"pid": int(pid), "command": os.fsdecode(line), "directory": os.readlink(f"/proc/{pid}/cwd")})
        except OSError:
            continue
    return found


def private(pid: int) -> list[str]:
    """Return the directories of SHARED that a process sees otherwise than this one, by a way into them."""
    found = []
    for top in SHARED:
        try:
            inside = f"/proc/{pid}/root{top}"
            if not os.path.samestat(os.stat(inside), os.stat(top)):
                found.append(inside)
        except OSError:
            continue
    return found


def under_way(dns: set[str]) -> Iterator[Any]:
    """Yield glexec's entries of the payloads of these users."""
    try:
        sys.path.insert(0, "/usr/lib/pilotbed")
        from pilotbed.glexec import journal

        yield from (case for case in journal.under_way() if case.monitor and case.log.get("dn") in dns)
    except (ImportError, OSError):
        return  # no worker


def payload(case: Any) -> dict[str, Any]:
    """Return what there is of one payload."""
    mine = processes(case.target)
    tops: list[tuple[str, int | None]] = [(case.sandbox, None)] if case.sandbox else []
    ways = {way for one in mine for way in private(one["pid"])}
    tops += [(top, case.target) for top in [*SHARED, pwd.getpwuid(case.target).pw_dir, *sorted(ways)]]
    paths = {path: None for top, uid in tops for path in below(top, uid)}
    if case.target_proxy:
        paths[case.target_proxy] = None
    files, cut = looked_at(paths)
    log = {name: str(value) for name, value in case.log.items()}
    return {"log": log, "sandbox": case.sandbox, "processes": mine, "files": files, "cut": cut}


def looked_at(paths: Iterable[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the description of files, and how many were left out for lack of time or room."""
    found: list[dict[str, Any]] = []
    paths = list(paths)
    for at, path in enumerate(paths):
        if time.monotonic() > _end or len(found) >= FILES:
            return found, len(paths) - at
        try:
            found.append(described(path))
        except OSError:
            continue
    return found, 0


def main() -> None:
    """Print what was asked for."""
    asked = json.loads(sys.argv[1])
    # One view of an account's /tmp is seen from each of its payloads; what is listed twice is there twice.
    told: dict[str, Any] = {"at": time.time(), "payloads": [payload(case) for case in under_way(set(asked["dns"]))]}
    told["files"], told["cut"] = looked_at(asked["paths"])
    print(json.dumps(told))


if __name__ == "__main__":
    main()
