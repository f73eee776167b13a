"""The computing element's mapping: A-REX asks for the account of a client, and the site's LCMAPS policy names it.

In place of ARC's arc-lcmaps, which has LCMAPS read the name, as root, from all certificates that a client has sent,
also from such as have nothing to do with its own (see `Lcmaps.chain`). Here LCMAPS runs as the account ``glexec``,
which owns the leases, and the name that it reads has to be the one that A-REX has verified.
"""

from __future__ import annotations

import grp
import os
import pwd
import sys
from pathlib import Path

from ..lcmaps import ChainError, Lcmaps, LcmapsError
from . import MAPPER_ACCOUNT

DATABASE, POLICY = "/etc/lcmaps/lcmaps-arc.db", "voms"


def main() -> int:
    """Map ``sys.argv``: DN that A-REX has verified (%D), file with the client's chain (%P), gridmapdir.

    Prints ACCOUNT:GROUP and returns 0; returns 1 with the reason on standard error, which A-REX logs, if there is none.
    """
    dn, path, gridmapdir = sys.argv[1:]
    try:
        pem = Path(path).read_bytes()  # A-REX's own, for root alone
        account = pwd.getpwnam(MAPPER_ACCOUNT)
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        lcmaps = Lcmaps(DATABASE, POLICY, gridmapdir=gridmapdir)
        name = lcmaps.chain(pem)[2]
    except (OSError, KeyError, LcmapsError, ChainError) as error:
        return _refused(f"{dn}: {error}")
    if name != dn:
        return _refused(f"{dn} has sent the certificates of {name}")
    found = lcmaps.run_with_pem(pem)
    if not found:
        return _refused(f"the site gives {dn} no account: see the journal (lcmaps)")
    # A-REX takes all of it for the name.
    print(f"{pwd.getpwuid(found.uid).pw_name}:{grp.getgrgid(found.gid).gr_name}", end="")
    return 0


def _refused(reason: str) -> int:
    print(f"arc-mapping: {reason}", file=sys.stderr)
    return 1
