"""The traffic of `bench_relay`: one service, its clients, and many agents in one process.

So that the generator is no bottleneck, bytes are sent from a file in memory by sendfile(2) and thrown away in the
kernel where they arrive (MSG_TRUNC, tcp(7)); what the direct route shows is its ceiling. Clients print JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import resource
import selectors
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

#: First byte of a connection: what the service is to do. What follows `UP` is thrown away, and answered with the
#: number of bytes (eight bytes). After `DOWN` come the seconds for which to send (a double).
ECHO, UP, DOWN = b"E", b"U", b"D"

_CHUNK = 1 << 20
_SOURCE = 64 << 20


def quantile(values: Iterable[float], fraction: float) -> float:
    """Return the smallest of ``values`` that at least ``fraction`` of them do not exceed (nearest rank).

    Raises:
        ValueError: there are no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("a quantile of nothing")
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


def spread(seconds: Iterable[float]) -> dict[str, float]:
    """Return median and 99th percentile of durations, in milliseconds."""
    values = list(seconds)
    return {"median_ms": 1e3 * quantile(values, 0.5), "p99_ms": 1e3 * quantile(values, 0.99)}


# -- bytes


def _send_for(sock: socket.socket, seconds: float) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:  # memory
        file.truncate(_SOURCE)
        offset, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            offset = (offset + os.sendfile(sock.fileno(), file.fileno(), offset, _CHUNK)) % _SOURCE


def _discard(sock: socket.socket) -> int:
    """Read to the end; return the number of bytes."""
    total, untouched = 0, bytearray(_CHUNK)
    while count := sock.recv_into(untouched, 0, socket.MSG_TRUNC):
        total += count
    return total


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionError(f"closed after {len(data)} of {count} bytes")
        data += part
    return data


def _connect(host: str, port: int) -> socket.socket:
    sock = socket.create_connection((host, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


# -- the service


def serve(port: int) -> None:
    """Serve until killed: echoes in one loop, streams in a process each."""
    with socket.create_server(("", port), backlog=4096) as listener, selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(0.2):
                if key.fileobj is listener:
                    _accept(listener, selector)
                    continue
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                try:
                    data = sock.recv(1 if key.data is None else 65536)
                    if data and key.data is None and data in (UP, DOWN):
                        _fork(lambda sock=sock, kind=data: _stream(sock, kind))  # type: ignore[misc]
                        data = b""
                    elif data and key.data is None:
                        selector.modify(sock, selectors.EVENT_READ, ECHO)
                    elif data:
                        sock.send(data)
                except OSError:
                    data = b""
                if not data:
                    selector.unregister(sock)
                    sock.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # reaped, its CPU time counts as ours
                    pass


def _accept(listener: socket.socket, selector: selectors.BaseSelector) -> None:
    with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
        for _ in range(64):
            sock, _address = listener.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(sock, selectors.EVENT_READ)


def _stream(sock: socket.socket, kind: bytes) -> None:
    sock.setblocking(True)
    if kind == UP:
        sock.sendall(struct.pack("!Q", _discard(sock)))
    else:
        _send_for(sock, *struct.unpack("!d", _exactly(sock, 8)))
    sock.shutdown(socket.SHUT_WR)  # a sibling that was forked meanwhile holds this socket, too


def _fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a process of its own; return its PID."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except Exception as error:  # whatever it is, the parent must learn of it
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


# -- clients


def _together(workers: Sequence[Callable[[], Any]]) -> tuple[list[Any], float]:
    """Run ``workers`` at once, in a process each; return what they return, and the CPU-seconds that they took."""
    results = []
    for worker in workers:
        read, write = os.pipe()

        def work(worker: Callable[[], Any] = worker, write: int = write) -> None:
            with os.fdopen(write, "w") as out:
                json.dump(worker(), out)

        _fork(work)
        os.close(write)
        results.append(os.fdopen(read))
    texts = [result.read() for result in results]
    if any(os.waitstatus_to_exitcode(os.wait()[1]) for _ in workers):
        raise RuntimeError("a worker failed; what it said stands above")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return [json.loads(text) for text in texts], used.ru_utime + used.ru_stime


def transfer(host: str, port: int, kind: bytes, streams: int, seconds: float) -> dict[str, float]:
    """Move bytes over ``streams`` connections at once for ``seconds``, towards the service (`UP`) or from it (`DOWN`).

    Returns:
        ``bytes`` that arrived, ``seconds`` from the first connection to the last byte, ``cpu`` seconds of this client.
    """

    def one() -> int:
        with _connect(host, port) as sock:
            if kind == DOWN:
                sock.sendall(DOWN + struct.pack("!d", seconds))
                return _discard(sock)
            sock.sendall(UP)
            _send_for(sock, seconds)
            sock.shutdown(socket.SHUT_WR)
            return int(struct.unpack("!Q", _exactly(sock, 8))[0])

    started = time.monotonic()
    moved, cpu = _together([one] * streams)
    return {"bytes": sum(moved), "seconds": time.monotonic() - started, "cpu": cpu}


def echo(host: str, port: int, count: int) -> dict[str, float]:
    """Send one byte and wait for it, ``count`` times over one connection."""
    with _connect(host, port) as sock:
        sock.sendall(ECHO)
        rounds = list(_rounds(sock, count + 100))[100:]  # the first ones warm up
    return spread(rounds)


def _rounds(sock: socket.socket, count: int) -> Iterator[float]:
    for _ in range(count):
        started = time.perf_counter()
        sock.sendall(b"x")
        _exactly(sock, 1)
        yield time.perf_counter() - started


def connections(host: str, port: int, workers: int, seconds: float) -> dict[str, float]:
    """Open connections, each used for one byte there and back, one after another in each of ``workers`` processes."""

    def one() -> list[float]:
        times, end = [], time.monotonic() + seconds
        while (started := time.monotonic()) < end:
            with _connect(host, port) as sock:
                sock.sendall(ECHO + b"x")
                _exactly(sock, 1)
            times.append(time.monotonic() - started)
        return times

    started = time.monotonic()
    answers, cpu = _together([one] * workers)
    elapsed = time.monotonic() - started
    times = [value for answer in answers for value in answer]
    return {"count": len(times), "per_second": len(times) / elapsed, "cpu": cpu, **spread(times)}


def queries(collector: str, schedd: str, workers: int, seconds: float) -> dict[str, float]:
    """Ask a schedd for jobs that it does not have, in ``workers`` processes; every query is a new connection.

    The first query of each worker authenticates and is not counted, the others use its security session.
    """
    import htcondor2

    def one() -> list[float]:
        found = htcondor2.Collector(collector).locate(htcondor2.DaemonType.Schedd, schedd)
        service = htcondor2.Schedd(found)
        times: list[float] = []
        end = 0.0
        while not times or time.monotonic() < end:
            started = time.monotonic()
            service.query("ClusterId =?= 0", ["ClusterId"])
            times.append(time.monotonic() - started)
            end = end or time.monotonic() + seconds
        return times[1:] or times

    answers, cpu = _together([one] * workers)
    times = [value for answer in answers for value in answer]
    rate = sum(len(answer) / sum(answer) for answer in answers)
    return {"count": len(times), "per_second": rate, "cpu": cpu, **spread(times)}


# -- what stays and answers orders on stdin, one JSON line each


def hold() -> None:
    """Open streams and keep them.

    An order is ``{"host", "ports", "each", "keep"}``: open ``each`` streams to every port in turn, one after another,
    and keep them or close each at once. The answer: ``opened``, ``seconds`` and the spread from connect to first echo.
    """
    kept = []
    for order in map(json.loads, sys.stdin):
        times, began = [], time.monotonic()
        for _ in range(order["each"]):
            for port in order["ports"]:
                started = time.monotonic()
                sock = _connect(order["host"], port)
                sock.sendall(ECHO + b"x")
                _exactly(sock, 1)
                times.append(time.monotonic() - started)
                if order["keep"]:
                    kept.append(sock)
                else:
                    sock.close()
        _answer(opened=len(times), seconds=time.monotonic() - began, **spread(times))


async def agents(arguments: Sequence[str], directory: Path, parallel: int) -> None:
    """Be many of the relay's agents, the real ones, in one process.

    An order is a number: have so many agents registered. The answer: ``seconds`` that it took, and all their ``ports``.

    Args:
        arguments: of the agent's command line, without ``--state``.
        directory: for the state files.
        parallel: how many register at a time.
    """
    from pilotbed.relay import agent

    ports: list[int] = []
    turns = asyncio.Semaphore(parallel)
    running = []

    async def start(number: int) -> None:
        state = directory / f"{number}.json"
        async with turns:
            work = asyncio.ensure_future(
                agent.Agent(agent.parse([*arguments, "--state", str(state), "--pilot", f"agent-{number}"])).run()
            )
            running.append(work)
            while not state.exists():
                if work.done():
                    raise RuntimeError(f"agent {number} ended with {work.result()}")
                await asyncio.sleep(0.005)
            ports.append(json.loads(state.read_text())["port"])

    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        began = time.monotonic()
        await asyncio.gather(*(start(number) for number in range(len(ports), int(line))))
        _answer(seconds=time.monotonic() - began, ports=ports)


def _answer(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="load", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], object], **fields: Callable[[str], object]) -> None:
        made = commands.add_parser(name)
        made.set_defaults(run=run)
        for field, kind in fields.items():
            made.add_argument(field, type=kind)

    where: dict[str, Callable[[str], object]] = {"host": str, "port": int}
    command("serve", lambda x: serve(x.port), port=int)
    command("up", lambda x: _answer(**transfer(x.host, x.port, UP, x.streams, x.seconds)),
            **where, streams=int, seconds=float)  # fmt: skip
    command("down", lambda x: _answer(**transfer(x.host, x.port, DOWN, x.streams, x.seconds)),
            **where, streams=int, seconds=float)  # fmt: skip
    command("echo", lambda x: _answer(**echo(x.host, x.port, x.count)), **where, count=int)
    command("connections", lambda x: _answer(**connections(x.host, x.port, x.workers, x.seconds)),
            **where, workers=int, seconds=float)  # fmt: skip
    command("queries", lambda x: _answer(**queries(x.collector, x.schedd, x.workers, x.seconds)),
            collector=str, schedd=str, workers=int, seconds=float)  # fmt: skip
    command("hold", lambda x: hold())
    command("agents", lambda x: asyncio.run(agents(x.arguments, x.directory, x.parallel)),
            directory=Path, parallel=int)  # fmt: skip
    given, rest = parser.parse_known_args(argv)
    given.arguments = rest
    given.run(given)


if __name__ == "__main__":
    main()
