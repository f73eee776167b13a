"""The mapfile of HTCondor's computing element, made from LCMAPS: which account a pilot has there.

HTCondor maps whoever speaks by a file, and has no call-out. A proxy with VOMS attributes is to it the end entity's DN
and the FQANs, the primary one first, with commas between them (X509_FQAN_DELIMITER). So LCMAPS is asked beforehand for
each pilot that the site knows of: one that it refuses, as it is banned, has no line, and nobody else has one.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

from ..files import replace_file
from ..lcmaps import Lcmaps, LcmapsError
from . import MAPPER_ACCOUNT

CONFIGURATION = Path("/etc/condor-ce/pilots.json")
DATABASE, POLICY = "/etc/lcmaps/lcmaps-mapping.db", "mapping"
#: Accounts of this host are themselves, by its file system.
LOCAL = "FS /^(.*)$/ \\1\n"


def line(dn: str, fqan: str, account: str) -> str:
    """Return the mapfile's line for a pilot.

    Args:
        dn: of the end entity, in OpenSSL's one-line form.
        fqan: what has to be the primary one, without Capability.
        account: what it is mapped to.
    """
    words = re.escape(f"{dn},{fqan}").replace("/", r"\/").replace("\\ ", " ")
    return f"SSL /^{words}(\\/Capability=NULL)?(,.*)?$/ {account}\n"


def accounts(pilots: list[dict[str, str]], gridmapdir: str) -> list[str | None]:
    """Return the account that LCMAPS gives to each of ``pilots`` (``dn``, ``fqan``), in a process of the mapper's own.

    Raises:
        LcmapsError: it could not be asked.
    """
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(receiving)
            mapper = pwd.getpwnam(MAPPER_ACCOUNT)
            os.setgroups([])
            os.setgid(mapper.pw_gid)
            os.setuid(mapper.pw_uid)
            lcmaps = Lcmaps(DATABASE, POLICY, gridmapdir=gridmapdir)
            found = (lcmaps.run_with_fqans(pilot["dn"], (pilot["fqan"],)) for pilot in pilots)
            answer = json.dumps([one and pwd.getpwuid(one.uid).pw_name for one in found])
            with os.fdopen(sending, "w") as pipe:
                pipe.write(answer)
            code = 0
        except (OSError, KeyError, LcmapsError) as error:
            print(f"condor-ce-mapfile: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        answer = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise LcmapsError("LCMAPS was not asked: see above, and the journal (lcmaps)")
    named: list[str | None] = json.loads(answer)
    return named


def main() -> int:
    """Write the mapfile, if it changes, and say what is in it; with ``--tell`` HTCondor is told.

    Returns 0, or 1 with the reason on standard error.
    """
    try:
        configuration = json.loads(CONFIGURATION.read_text())
        pilots, mapfile = configuration["pilots"], Path(configuration["mapfile"])
        named = accounts(pilots, configuration["gridmapdir"])
    except (OSError, ValueError, LcmapsError) as error:
        print(f"condor-ce-mapfile: {error}", file=sys.stderr)
        return 1
    made = [line(pilot["dn"], pilot["fqan"], name) for pilot, name in zip(pilots, named, strict=True) if name]
    text = "".join([*made, LOCAL])
    if mapfile.exists() and mapfile.read_text() == text:
        return 0
    replace_file(mapfile, text, 0o644)
    for pilot, name in zip(pilots, named, strict=True):
        print(f"{pilot['dn']} as {pilot['fqan']}: {name or 'no account'}")
    if "--tell" in sys.argv[1:]:
        return subprocess.run(["/usr/bin/condor_ce_reconfig"], check=False).returncode
    return 0
