"""NAT that forgets: the worker reaches the relay, and a connection that is quiet for a while goes on."""

from collections.abc import Iterator

from pilotbed_suite import inventory
from pilotbed_training import examine

ALLOWED = ()
#: On a worker: a connection through the router to an ssh server, which waits for its client; quiet for some seconds.
QUIET = r"""
import socket, sys, time
with socket.create_connection((sys.argv[1], 22), 10) as stream:
    stream.recv(1000)
    time.sleep(float(sys.argv[2]))
    stream.sendall(b"SSH-2.0-lesson\r\n")
    stream.settimeout(6)
    sys.exit(0 if stream.recv(1000) else 1)
"""
SECONDS = 9


def relay_is_reached() -> Iterator[str]:
    """Every worker reaches the relay's control port."""
    known = inventory.load()
    port = known.variable("grid_relay_port")
    for name in known.names("worker"):
        for relay in known.names("relay"):
            address = f"{relay}.{known.variable('grid_domain')}"
            if examine.host(name).run(f"timeout 4 bash -c ': < /dev/tcp/{address}/{port}'").rc:
                yield f"{name} gets no answer from {address}:{port}: no pilot there can be reached by the pool"


def connections_are_remembered() -> Iterator[str]:
    """The site's router remembers a connection that is quiet for a while."""
    known = inventory.load()
    target = f"{known.first('relay')}.{known.variable('grid_domain')}"
    for name in known.names("worker"):
        if examine.host(name).run("python3 -I -c %s %s %s", QUIET, target, str(SECONDS)).rc:
            yield f"a connection of {name}'s that was quiet for {SECONDS} s is dead, and neither side was told"


def jobs_have_run() -> Iterator[str]:
    """Alice's job has run, through the relay."""
    yield from examine.called_jobs_end_well("lesson-05", 1)


CHECKS = (relay_is_reached, connections_are_remembered)
JOBS = (jobs_have_run,)
