"""A frontend takes back what it has asked for, as it is configured to: its pilots go.

    frontend ── glideclient: ReqRemoveExcess ──▶ factory ── condor_rm ──▶ CE ──▶ the pilots' end

Told nothing, idle pilots end by themselves, minutes later (GLIDEIN_Max_Tail).
"""

import re
from contextlib import contextmanager

import pytest
from pilotbed_suite.support import explained, ok, until, until_none, write

pytestmark = pytest.mark.stage(2)

CONFIG = "/run/pilotbed-test-frontend.toml"
DROP_IN = f"[Service]\nExecStart=\nExecStart=/usr/bin/pilotbed-frontend --config {CONFIG}\n"


@contextmanager
def pressed(frontend, group, pressure):
    """A group's frontend with more in its [pressure]; by a drop-in: a file that is put back is newer than its unit."""
    unit = f"pilotbed-frontend@{group}.service"
    dropped = f"/run/systemd/system/{unit}.d"
    config = ok(frontend, "cat %s", f"/etc/pilotbed/frontend/{group}.toml")
    changed, count = re.subn(r"^\[pressure\]\n", rf"\g<0>{pressure}\n", config, flags=re.MULTILINE)
    assert count == 1
    try:
        write(frontend, CONFIG, changed, mode="0644")
        ok(frontend, "mkdir -p %s", dropped)
        write(frontend, f"{dropped}/pilotbed-test.conf", DROP_IN, mode="0644")
        ok(frontend, "systemctl daemon-reload && systemctl restart %s", unit)
        yield
    finally:
        ok(frontend, f"rm -rf {CONFIG} {dropped} && systemctl daemon-reload && systemctl restart {unit}")


def test_pilots_go_as_soon_as_the_frontend_is_told_so(grid, central, pilots, any_site):
    frontend, factory = grid.node("frontend"), grid.node("factory")
    group = grid.variable("grid_vos")[0]["frontend_group"]
    wanted = f'GroupName == "{group}" && split(ReqGlidein, "@")[0] == "{any_site.name}"'

    def asked():
        """How much may go: while its jobs run, and pilots are there, time alone never makes it all."""
        request = "pilotbed-factory-pool condor_status -any -constraint %s -af ReqRemoveExcess"
        return ok(factory, request, f'GlideinMyType == "glideclient" && {wanted}').strip()

    pilots(any_site)
    assert asked() in ("NO", "WAIT", "IDLE"), "control"
    with (
        explained((frontend, f"journalctl --unit pilotbed-frontend@{group} --output cat --no-pager --lines 20")),
        pressed(frontend, group, 'remove_type = "ALL"\nrequests_tracking = true'),
    ):
        until("the frontend wants them back", lambda: asked() == "ALL")
        until_none("its pilots there have gone", lambda: any_site.slots(central))
