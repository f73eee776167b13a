"""Streams that outlive the relay's process: systemd keeps their sockets and pipes, and gives them to the next one.

What a stream has under way is in the kernel: in a socket, or in one of its two pipes. A process that is killed between
two system calls has lost nothing and repeats nothing, so its successor carries on where it was. See
FileDescriptorStoreMax= in systemd.service(5); systemd closes what it keeps when the service is stopped for good.
"""

import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

from pilotbed.relay.sockets import reset
from pilotbed.relay.streams import Forwarder, Pipe
from pilotbed.service import inherited, notify

_DESCRIPTORS = 6  # of a stream: two sockets, two pipes
_PARTS = ("sockets", "inward", "outward")


@dataclass
class StoredStream:
    """A stream of an earlier process.

    Attributes:
        name: of its entries in the store.
        sockets: both.
        pipes: towards the daemon, and away from it; None for a direction that had ended.
    """

    name: str
    sockets: list[socket.socket] = field(default_factory=list)
    pipes: list[Pipe | None] = field(default_factory=lambda: [None, None])

    def reset(self) -> None:
        """Give it up: nobody goes on with it, and neither side is to take that for an orderly end."""
        for sock in self.sockets:
            reset(sock)
        for pipe in filter(None, self.pipes):
            os.close(pipe[0])
            os.close(pipe[1])


class DescriptorStore:
    """What systemd stores for this process: as many streams as the unit's FileDescriptorStoreMax= has room for."""

    def __init__(self) -> None:
        self._room = int(os.environ.get("FDSTORE", "0")) // _DESCRIPTORS

    def store(self, forwarder: Forwarder) -> str:
        """Have a stream stored; return its name, "" where that cannot be.

        Raises:
            OSError: there are no descriptors for that now.
        """
        pipes = forwarder.pin_pipes() if self._room > 0 else (None, None)
        if not any(pipes):
            return ""
        self._room -= 1
        name = secrets.token_hex(8)
        parts = (forwarder.outer.fileno(), forwarder.inner.fileno()), *pipes
        # The sockets come last: without them nobody takes what was handed over before this process was killed.
        try:
            for part, descriptors in reversed(list(zip(_PARTS, parts, strict=True))):
                if descriptors:
                    # A peer that hangs up is for the relay to hear of, not a reason to remove it (FDPOLL).
                    notify(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}.{part}", descriptors)
        except OSError:
            self.remove(name)
            raise
        return name

    def remove(self, name: str) -> None:
        """Have a stream stored no longer."""
        self._room += 1
        for part in _PARTS:
            notify(f"FDSTOREREMOVE=1\nFDNAME={name}.{part}")

    def restore(self) -> Iterator[StoredStream]:
        """The streams that an earlier process had stored; once. They count as this one's."""
        found: dict[str, StoredStream] = {}
        for label, descriptors in inherited().items():
            name, _, part = label.rpartition(".")
            stream = found.setdefault(name, StoredStream(name))
            if part == _PARTS[0]:
                stream.sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
            elif part in _PARTS and len(descriptors) == 2:  # both ends, in no order
                reads, writes = sorted(descriptors, key=_is_writing_end)
                stream.pipes[_PARTS.index(part) - 1] = reads, writes
            else:
                for descriptor in descriptors:
                    os.close(descriptor)
        self._room -= len(found)
        yield from found.values()


def _is_writing_end(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
