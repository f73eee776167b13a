"""One changed byte between the factory and the worker: the pilot refuses to start, and says why.

    factory's stage area ──▶ nginx ──▶ (Squid's disk) ──▶ glidein_startup.sh on a worker
          ^ one byte                     ^ one byte         digests came with the job, by another way

The pilot is started by hand with the arguments of the factory's latest pilot, on a worker of a site without a cache for
the first, with one for the second. With the byte put back the same pilot goes on.
"""

import re

import pytest
from pilotbed_suite.reach import host
from pilotbed_suite.support import HandPilot, arguments, edited, ok, until, worker_with_a_pilot

pytestmark = pytest.mark.stage(2)

#: The first script of the factory's that a pilot fetches and runs.
VICTIM = "validate_node"
FLIP = "printf X | dd of=\"$f\" bs=1 seek=$(($(stat -c %%s \"$f\") - 2)) conv=notrunc status=none"


@pytest.fixture(scope="module")
def staged(grid):
    """The path of the victim in the factory's stage area."""
    return ok(grid.node("factory"), f"ls /var/lib/pilotbed/factory/stage/{VICTIM}.*.sh").strip()


def goes_on(pilot):
    """Wait until the pilot runs the victim."""
    until(f"the pilot runs {VICTIM}", lambda: f"running {VICTIM}.sh" in pilot.said() or pilot.check())


@pytest.fixture(scope="module")
def cacheless(grid, pilots):
    site = grid.site("without a cache", lambda site: not site.cache)
    pilots(site)
    return site


@pytest.fixture(scope="module")
def cached(grid, pilots):
    site = grid.site("with a cache", lambda site: site.cache)
    pilots(site)
    return site


def assert_refused(said, staged):
    name = staged.rpartition("/")[2]
    assert re.search(rf"^glidein: refused: {name} from http://\S+/stage: digest mismatch \(signed \w{{64}}", said,
                     re.MULTILINE), said  # fmt: skip
    assert f"running {VICTIM}.sh" not in said
    assert "condor_startup" not in said


@pytest.mark.check("D1.4")
def test_changed_byte_in_the_stage_area(grid, cacheless, staged):
    pilot = HandPilot(worker_with_a_pilot(cacheless), arguments(cacheless))
    with edited(grid.node("factory"), staged, FLIP), pilot:
        said = pilot.refusal()
    assert_refused(said, staged)
    # What a factory reads, too: an XML summary with the reason.
    assert re.search(r"<status>ERROR</status>.*<detail>\s*refused: ", said, re.DOTALL)


@pytest.mark.check("D1.4", control=True)
def test_with_the_byte_put_back_the_pilot_goes_on(cacheless):
    with HandPilot(worker_with_a_pilot(cacheless), arguments(cacheless)) as pilot:
        goes_on(pilot)


@pytest.fixture(scope="module")
def object_(grid, cached, staged):
    """Squid's file of the victim on its disk, after a worker has fetched it."""
    cache, name = host(cached.cache), staged.rpartition("/")[2]
    url = f"http://{grid.fqdn(grid.names('factory')[0])}/factory/stage/{name}"
    fetch = "curl --silent --fail --output /dev/null --proxy %s %s"
    ok(host(cached.workers[0]), fetch, f"http://{cached.cache}:3128", url)

    def copies():
        return cache.run("grep -rlF %s /var/spool/squid/[0-9A-F]*", url).stdout.split()

    return until("Squid has it on disk", copies)[0]


@pytest.fixture
def tampered(cached, object_):
    """One byte of Squid's copy is another; its memory is emptied by a restart, before and after."""
    cache = host(cached.cache)

    def restart():
        ok(cache, "systemctl restart squid")

    try:
        with edited(cache, object_, FLIP):
            restart()
            yield
    finally:
        restart()


@pytest.mark.check("D1.4")
def test_changed_byte_in_the_caches_copy(grid, cached, staged, tampered):
    worker, name = worker_with_a_pilot(cached), staged.rpartition("/")[2]
    url = f"http://{grid.fqdn(grid.names('factory')[0])}/factory/stage/{name}"
    digest = "curl --silent --fail {} %s | sha256sum"
    assert ok(worker, digest.format(f"--proxy http://{cached.cache}:3128"), url) != ok(worker, digest.format(""), url)
    with HandPilot(worker, arguments(cached)) as pilot:
        said = pilot.refusal()
    assert_refused(said, staged)


@pytest.mark.check("D1.4", control=True)
def test_with_the_caches_byte_put_back_the_pilot_goes_on(cached, object_):
    with HandPilot(worker_with_a_pilot(cached), arguments(cached)) as pilot:
        goes_on(pilot)
