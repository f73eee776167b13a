"""A proxy that the caller replaces while the payload runs: it reaches the payload if it is the same user's."""

import contextlib
import fcntl
import threading
from pathlib import Path

import pytest
from glexecbed import GLEXEC, GRIDMAPDIR, PILOT, until


@contextlib.contextmanager
def running(pilot, cgroups="writable"):
    """A payload in its sandbox, as the job wrapper starts it; yields where its copy of the proxy is."""
    work = pilot.work
    env = pilot.environment(GLEXEC_SANDBOX=work, GLEXEC_SOURCE_PROXY=pilot.proxy, GLEXEC_TARGET_PROXY=f"{work}/copy")
    process = pilot.bed.start(GLEXEC, "/bin/sh", "-c", "echo started; exec sleep 1000", env=env, cgroups=cgroups)
    assert process.stdout.readline() == "started\n"
    try:
        yield pilot.bed.path(f"{work}/copy")
    finally:
        pilot.bed.root("pkill -x sleep")
        pilot.bed.finish(process)


def replace(pilot, content, mode=0o600):
    """Put a new proxy in the old one's place, as HTCondor's starter does."""
    pilot.bed.write(f"{pilot.work}/new", content, mode=mode)
    pilot.bed.root(f"mv {pilot.work}/new {pilot.proxy}")


def refusals(pilot, since):
    return [line for line in pilot.bed.log()[since:] if "not refreshed" in line]


@pytest.mark.parametrize("cgroups", ["writable", "absent"])
def test_fresh_proxy_reaches_the_payload(pilot, cgroups):
    with running(pilot, cgroups) as copy:
        for _ in range(2):
            fresh = pilot.bed.proxy()
            replace(pilot, fresh)
            until("the payload has the new proxy", lambda fresh=fresh: copy.read_bytes() == fresh)
        assert copy.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("what", ["another user's", "expired", "open to others", "garbage"])
def test_any_other_is_refused_once(pilot, what):
    with running(pilot) as copy:
        before, since = copy.read_bytes(), len(pilot.bed.log())
        bad = {
            "another user's": (pilot.bed.proxy("bob"), 0o600), "expired": (pilot.bed.proxy(hours=-1), 0o600),
            "open to others": (pilot.bed.proxy(), 0o644), "garbage": (b"none", 0o600),
        }  # fmt: skip
        replace(pilot, *bad[what])
        until("it is refused", lambda: refusals(pilot, since))
        good = pilot.bed.proxy()
        assert copy.read_bytes() == before
        replace(pilot, good)
        until("a good one is taken all the same", lambda: copy.read_bytes() == good)
        assert len(refusals(pilot, since)) == 1


def test_proxy_that_is_replaced_while_it_is_looked_at(pilot):
    """The starter does so to a job whose owner has just made another proxy; here while LCMAPS waits for its turn."""
    assert pilot.glexec().code == 0, "and the lock is there"
    fresh, found = pilot.bed.proxy(), []

    def change():
        with pilot.bed.path(f"{GRIDMAPDIR}/.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held.set()
            until("glexec waits", lambda: "-> FLOCK  ADVISORY  WRITE" in Path("/proc/locks").read_text())
            replace(pilot, fresh)
            found.append(True)

    held = threading.Event()
    thread = threading.Thread(target=change)
    thread.start()
    held.wait()
    with running(pilot) as copy:
        assert found
        until("the payload has the new proxy", lambda: copy.read_bytes() == fresh)
    thread.join()
    assert pilot.bed.root(f"stat -c %U {pilot.proxy}").strip() == PILOT, "it has stayed the caller's"


def test_proxy_that_is_taken_away_stays_with_the_payload(pilot):
    with running(pilot) as copy:
        since = len(pilot.bed.log())
        pilot.bed.root(f"mv {pilot.proxy} {pilot.work}/away")
        replace_later = pilot.bed.proxy()
        replace(pilot, replace_later)
        until("the next one is taken", lambda: copy.read_bytes() == replace_later)
        assert refusals(pilot, since) == []
