"""An incident's evidence: collected from all nodes, without private keys, in one archive that the grid's CA host signs.

The CA host's own certificate signs, not the CA: that one signs certificates and CRLs only. The host is the one with the
fewest services, its key does not leave it, every node trusts the CA behind it, and the control host has no name in the
grid. What is signed is the archive's SHA-256, so that the archive itself need not go there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pilotbed.files import replace_file

from .. import GridError
from ..inventory import Inventory
from . import nodes
from .nodes import NodeError, ok

#: What is kept in an incident's directory: the files, the archive of them, its signed sum, the CA's certificate.
EVIDENCE, ARCHIVE, SIGNED, AUTHORITY = "evidence", "archive.tar.gz", "archive.sha256.p7m", "ca.pem"
MANIFEST = "SHA256SUMS"
#: Bytes of one file of a node's, and of all of them, that are taken.
_FILE, _ALL = 65 << 20, 1 << 30
#: Where a private key begins or ends, what may be of one, and how far behind its beginning.
_MARK = re.compile(rb"-----(BEGIN|END) [A-Z ]{0,20}PRIVATE KEY-----")
_BASE64, _REACH = re.compile(rb"[A-Za-z0-9+/=]{32,}"), 1 << 14


def without_keys(content: bytes) -> bytes:
    """Return a file's content without the private keys in it.

    Behind a key's first line only what looks like base64 is taken out: whoever can write to a log could else have lines
    of others vanish from it.
    """
    marks = list(_MARK.finditer(content))
    kept, at = [], 0
    for mark, following in zip(marks, [*(one.start() for one in marks[1:]), len(content)], strict=False):
        kept += [content[at : mark.start()], mark[0].replace(b"PRIVATE KEY", b"KEY LEFT OUT")]
        at = mark.end()
        if mark[1] == b"BEGIN":
            end = min(following, at + _REACH)
            kept.append(_BASE64.sub(b"[left out]", content[at:end]))
            at = end
    return b"".join([*kept, content[at:]])


def collect(known: Inventory, node: str, since: float, until: float, top: Path) -> str:
    """Fetch a node's logs of a time (1970 s) into ``top``/NODE, and return what to say of them.

    Raises:
        NodeError: it did not answer, or what it sent is no archive.
    """
    asked = {"since": since, "until": until, "files": known.logs(node, "files")}
    sent = nodes.program(node, "collect", asked, deadline=100).output
    count = unpack(node, sent, top / node)
    about = json.loads((top / node / "about.json").read_text())
    cut = f"; cut: {', '.join(about['cut'])}" if about.get("cut") else ""
    return f"{count} files, {len(sent) // 1024} KiB sent{cut}"


def unpack(node: str, sent: bytes, directory: Path) -> int:
    """Write the plain files of what a node has sent below ``directory``; return how many. Raises NodeError.

    The node may be in the wrong hands: nothing gets out of ``directory``, and not more than there may be.
    """
    count = total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(sent), mode="r|gz") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                total += member.size
                if member.size > _FILE or total > _ALL or ".." in parts or member.name.startswith("/"):
                    raise NodeError(f"{node}: it sent {member.name[:80]!r} of {member.size} bytes: not taken")
                file = archive.extractfile(member) if member.isreg() else None
                if file:
                    path = directory.joinpath(*(re.sub(r"[^A-Za-z0-9._@:+-]", "_", part) for part in parts))
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    replace_file(path, without_keys(file.read()), 0o600)
                    count += 1
    except (tarfile.TarError, OSError, EOFError) as error:
        raise NodeError(f"{node}: what it sent cannot be unpacked: {error}") from error
    if not (directory / "about.json").is_file():
        raise NodeError(f"{node}: what it sent is not whole")
    return count


def write_json(path: Path, value: object) -> None:
    """Write a table as JSON, without private keys."""
    replace_file(path, without_keys((json.dumps(value, indent=1) + "\n").encode()), 0o600)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(directory: Path, name: str) -> str:
    """Make the archive of a directory's evidence, with its manifest; return its SHA-256.

    Args:
        directory: the incident's.
        name: its id: the directory in the archive.
    """
    top = directory / EVIDENCE
    paths = [path for path in sorted(top.rglob("*")) if path.is_file() and path != top / MANIFEST]
    sums = "".join(f"{_digest(path)}  {path.relative_to(top)}\n" for path in paths)
    replace_file(top / MANIFEST, sums, 0o600)
    new = directory / f".{ARCHIVE}"
    with open(new, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        with tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as archive:
            for path in [top / MANIFEST, *paths]:
                archive.add(path, f"{name}/{path.relative_to(top)}", recursive=False)
        file.flush()
        os.fsync(file.fileno())
    new.replace(directory / ARCHIVE)
    return _digest(directory / ARCHIVE)


def sign(known: Inventory, directory: Path, digest: str) -> None:
    """Have the CA host sign the archive's sum, and see whether that is good. Raises GridError."""
    node = known.first("certificate_authority")
    text = f"{digest}  {ARCHIVE}"
    command = (
        "sh -c 'printf \"%%s\\n\" \"$1\" | openssl cms -sign -binary -nodetach -md sha256 -outform PEM "
        "-signer /etc/grid-security/hostcert.pem -inkey /etc/grid-security/hostkey.pem' sign %s"
    )
    signed = ok(node, command, text).output
    shown = json.loads(ok(node, "pilotbed-ca show").text)
    replace_file(directory / SIGNED, signed, 0o600, durable=True)
    replace_file(directory / AUTHORITY, shown["certificate"], 0o600)
    verify(directory)


def verify(directory: Path) -> None:
    """See whether an incident's archive is the one that was signed. Raises GridError."""
    command = ["openssl", "cms", "-verify", "-in", SIGNED, "-inform", "PEM", "-CAfile", AUTHORITY, "-purpose", "any"]
    done = subprocess.run(command, cwd=directory, capture_output=True, check=False)
    if done.returncode:
        raise GridError(f"{directory / SIGNED} is not signed by the grid: {done.stderr.decode().strip()[-200:]}")
    here = _digest(directory / ARCHIVE)
    if done.stdout.decode().split()[:1] != [here]:
        raise GridError(f"{directory / ARCHIVE} is not the archive that was signed: its sum is {here}")


def have(directory: Path, names: Iterable[str]) -> list[str]:
    """Return which nodes have sent their logs already."""
    return [name for name in names if (directory / EVIDENCE / name / "about.json").is_file()]


def evidence(directory: Path, tables: Mapping[str, Any]) -> None:
    """Write what was found and done beside the logs."""
    top = directory / EVIDENCE
    top.mkdir(mode=0o700, exist_ok=True)
    for name, value in tables.items():
        write_json(top / f"{name}.json", value)
