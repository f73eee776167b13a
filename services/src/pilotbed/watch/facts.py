"""What a host says of itself, read from the words of its own commands: sockets that listen, units, set-uid files.

Used on the host (``pilotbed-watch``) and from afar (the certificate). Standard library only.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: Commands whose output the functions here read.
SOCKETS = "ss -H -l -n -t -u -p"
UNITS = "systemctl list-units --state=active --type=service,timer,socket,path --no-legend --plain --full"
#: Without other file systems: what is mounted there has a host of its own, or takes no set-uid bit.
SETUID = r"find / -xdev -type f -perm /6000 -print0"

_PROGRAM = re.compile(r'\("([^"]+)"')
_ENDING = re.compile(r"\.(service|timer|socket|path)$")


@dataclass(frozen=True, order=True)
class Listener:
    """A socket that listens: ``protocol`` tcp or udp, ``program`` as ps calls it, "-" for the kernel."""

    protocol: str
    port: int
    address: str
    program: str


def listeners(said: str) -> list[Listener]:
    """Return what listens, once a program and address; ``said`` by SOCKETS."""
    found = set()
    for line in said.splitlines():
        protocol, _, _, _, local, _, *rest = line.split(maxsplit=6)
        address, _, port = local.rpartition(":")
        program = _PROGRAM.search(rest[0] if rest else "")
        found.add(Listener(protocol, int(port), address, program[1] if program else "-"))
    return sorted(found)


def protection(one: Listener, declarations: Iterable[Mapping[str, Any]]) -> str:
    """Return how a socket is protected, as it is declared; "" if it is not.

    What is declared for loopback must listen there only.
    """
    loopback = one.address.strip("[]").partition("%")[0].startswith(("127.", "::1"))
    for entry in declarations:
        if (
            entry["program"] == one.program
            and entry["proto"] == one.protocol
            and _covers(entry["port"], one.port)
            and (loopback or entry["from"] != "host")
        ):
            return str(entry["protected"])
    return ""


def _covers(ports: object, port: int) -> bool:
    """Tell whether a declaration's ports hold a port; ``dynamic`` ones are what the kernel gives."""
    if ports == "dynamic":
        return True
    for part in str(ports).split(","):
        first, _, last = part.partition("-")
        if int(first) <= port <= int(last or first):
            return True
    return False


def units(said: str) -> list[str]:
    """Return what runs, or is waited for: services, timers, sockets and paths without their endings; said by UNITS."""
    return sorted({_ENDING.sub("", line.split()[0]) for line in said.splitlines() if line.strip()})


def undeclared(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that no shell pattern covers; endings of units do not count."""
    known = [_ENDING.sub("", pattern) for pattern in patterns]
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known)]
