"""What goes from before.py, on the previous release's grid, to test_upgrade.py, after this one was deployed over it.

Molecule's scenario `upgrade` runs both: docs/molecule.md.
"""

import json
from dataclasses import asdict, replace

from pilotbed_suite import inventory, record
from pilotbed_suite.reach import host
from pilotbed_suite.support import GRID, Job, ok

KEPT = record("upgrade.json")
#: A DN that is banned at the site before.
BANNED = "/DC=org/DC=gridlab/CN=Banned Before The Upgrade"


class Before:
    """What there was before: jobs by name, and what was seen of the grid."""

    def __init__(self, jobs: dict[str, list[Job]], seen: dict) -> None:
        self.jobs, self.seen = jobs, seen

    def keep(self) -> None:
        """Have it for later."""
        jobs = {name: [asdict(replace(job, node=None)) for job in made] for name, made in self.jobs.items()}
        KEPT.write_text(json.dumps({"jobs": jobs, "seen": self.seen}))

    @classmethod
    def kept(cls) -> "Before":
        """Return what was kept."""
        told, node = json.loads(KEPT.read_text()), GRID.node("submit")
        jobs = {name: [Job(**one | {"node": node}) for one in made] for name, made in told["jobs"].items()}
        return cls(jobs, told["seen"])


def seen() -> dict:
    """Return what may not change: certificates by host, relays' leases, pilots with their processes, bans by host."""
    ban = "cat /etc/grid-security/ban_users.db"
    pilots = "ps -ww -eo pid=,lstart=,args= | grep -E '[c]ondor_(master|startd)' | sort"
    return {
        "certificates": {
            name: ok(host(name), "sha256sum /etc/grid-security/hostcert.pem /etc/grid-security/certificates/*.0")
            for name in inventory.load().hosts()
        },
        "leases": {
            relay: sorted(
                [lease["lease"], lease["port"], lease["pilot"]]
                for lease in json.loads(ok(host(relay), "pilotbed-relay status"))["leases"]
            )
            for relay in GRID.names("relay")
        },
        "pilots": {name: ok(host(name), pilots) for name in GRID.names("worker")},
        "bans": {name: ok(host(name), ban) for name in GRID.names("computing_element")},
    }
