"""What the factory packs for pilots, looked at where it is packed: HTCondor from the host's own Debian packages."""

import json

from pilotbed_suite.support import ok

PACK = """
import io, json, sys, tarfile
sys.path.insert(0, "/usr/lib/pilotbed")
from pilotbed.glidein import builder
first, second = builder.host_condor(), builder.host_condor()
with tarfile.open(fileobj=io.BytesIO(first)) as archive:
    members = [[m.name, m.mode, m.uid, m.mtime] for m in archive.getmembers()]
print(json.dumps({"same": first == second, "size": len(first), "members": members}))
"""


def test_the_packed_condor_is_small_and_reproducible(grid):
    packed = json.loads(ok(grid.node("factory"), "python3 -I -c %s", PACK))
    assert packed["same"]
    assert packed["size"] < 25_000_000
    names = {name for name, *_ in packed["members"]}
    assert {"sbin/condor_master", "sbin/condor_startd", "sbin/condor_starter"} <= names
    assert not any(name.startswith("lib/libcrypto") for name in names), "the worker's own gets the security updates"
    assert all((mode, uid, mtime) == (0o755, 0, 0) for _, mode, uid, mtime in packed["members"])
