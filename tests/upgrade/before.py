"""Jobs that run and jobs that wait, on the previous release; nothing is cleared up: test_upgrade.py does that."""

from kept import BANNED, Before, seen
from pilotbed_suite import walk
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, HOLD, Jobs, ok

#: What a payload is to its grid, once before and once afterwards.
SCRIPT = f"""#!/bin/sh
look() {{
    id -un
    hostname
    sha256sum /etc/grid-security/certificates/*.0
}}
look
{HOLD}
look
head -c 5M /dev/urandom > data.out
sha256sum < data.out
"""
DATA = 'transfer_output_files = data.out\ntransfer_output_remaps = "data.out = @NAME@.data"'


def test_the_previous_release_runs_jobs():
    alice, bob = walk.walker("alice"), walk.walker("bob")
    jobs, site = Jobs(GRID.node("submit")), GRID.sites[0]
    for ce in GRID.names("computing_element"):
        ok(host(ce), "pilotbed-ban dn -- %s", BANNED)
    running = [jobs.submit(who, site, SCRIPT, DATA) for who in (alice, bob)]
    for job in running:
        job.holds(site, 240)
    waiting = [jobs.submit(bob, site, "#!/bin/sh\nid -un\n", "hold = True") for _ in range(5)]
    Before({"running": running, "waiting": waiting}, seen()).keep()
