"""pilotbed-renew: keeps the proxies of running pilots alive, from the credential that the frontend left in MyProxy.

MyProxy trusts one robot certificate, of which every factory has its own, so this runs under an account of its own:
systemd hands it the key and copies of the stored proxies, it leaves longer-lived ones in a directory, and the factory
takes them from there by its own rule (same DN, longer life). So the key never comes near the account that talks to
frontends and CEs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pilotbed.files import replace_file
from pilotbed.gridtools import ToolError, own_copy, run
from pilotbed.proxy import Proxy, ProxyError
from pilotbed.service import event, read_file, set_up_logging

from .trust import CredentialName

_log = logging.getLogger("pilotbed.renew")


@dataclass(frozen=True)
class Renewal:
    """How proxies are renewed.

    Args:
        servers: host names of MyProxy servers, which have the same credentials: each is asked until one answers.
        voms: ``VO:FQAN`` for the attributes, by SecurityClass, which is the stored credential's name there, too.
        hours: life of a renewed proxy.
        certificate, key: of who may renew.
    """

    servers: Sequence[str]
    voms: Mapping[str, str]
    hours: int
    certificate: Path
    key: Path

    def renew(self, old: Path, security_class: str) -> str:
        """Return a renewed proxy (PEM) for the one in ``old``, with fresh VOMS attributes.

        Raises:
            ToolError: every MyProxy server or VOMS refused, or nobody said of which VO the SecurityClass is.
            ProxyError: what came back belongs to somebody else.
        """
        if security_class not in self.voms:
            raise ToolError(f"SecurityClass {security_class} has no --voms")
        with tempfile.TemporaryDirectory(prefix="renew") as directory:
            plain, full = Path(directory, "plain.pem"), Path(directory, "voms.pem")
            own = {
                "X509_USER_CERT": own_copy(self.certificate, Path(directory)),
                "X509_USER_KEY": own_copy(self.key, Path(directory)),
            }
            whose = ["-a", str(own_copy(old, Path(directory))), "-d", "-n", "-k", security_class]
            refusals = []
            for server in self.servers:
                try:
                    run(["myproxy-logon", "-s", server, *whose, "-o", str(plain), "-t", str(self.hours)], own)
                    break
                except ToolError as error:
                    refusals.append(f"{server}: {error}")
            else:
                raise ToolError("; ".join(refusals))
            # A credential in MyProxy has no VOMS attributes: they end after a day at the latest.
            what = ["-voms", self.voms[security_class], "-valid", f"{self.hours}:00"]
            run(["voms-proxy-init", "-quiet", "-noregen", *what, "-out", str(full)], {"X509_USER_PROXY": plain})
            pem = full.read_text()
        before, after = Proxy.read(read_file(old)), Proxy.read(pem)
        if before.dn != after.dn:
            raise ProxyError(f"MyProxy answered with a proxy of {after.dn}, not of {before.dn}")
        return pem


def main(argv: Sequence[str] | None = None) -> int:
    """Renew once what has little time left; return 1 if something could not be renewed."""
    parser = argparse.ArgumentParser(prog="pilotbed-renew", description="Renew stored pilot proxies from MyProxy.")
    parser.add_argument("--myproxy", required=True, action="append", metavar="HOST",
                        help="MyProxy server; again for another one that has the same")  # fmt: skip
    parser.add_argument(
        "--voms", required=True, action="append", type=_class_and_voms, metavar="CLASS=VO:FQAN",
        help="attributes to add to proxies of a SecurityClass, which names the stored credential, too",
    )  # fmt: skip
    parser.add_argument("--hours", type=int, default=12, help="life of a renewed proxy (default: 12)")
    parser.add_argument("--least", type=int, default=21600, metavar="SECONDS", help="renew with less than this left")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the factory takes them from")
    options = parser.parse_args(argv)
    set_up_logging()
    given = Path(os.environ.get("CREDENTIALS_DIRECTORY", ""))
    if not given.is_absolute():
        _log.error("CREDENTIALS_DIRECTORY is not set: start this as pilotbed-renew.service")
        return 2
    renewal = Renewal(options.myproxy, dict(options.voms), options.hours, given / "cert.pem", given / "key.pem")
    failed = False
    # systemd names the files of a directory that it loads NAME_FILE.
    for path in sorted(given.glob("pilots_*.pem")):
        name = path.name.removeprefix("pilots_")
        newest = max((path, options.out / name), key=_ends)
        left = _ends(newest) - time.time()
        if left >= options.least:
            _log.info(event("fresh", name=name, left=int(left)))
            continue
        try:
            stored = CredentialName.parse(name)
            pem = renewal.renew(path, stored.security_class if stored else "")
            replace_file(options.out / name, pem, 0o640)
            _log.info(event("renewed", name=name, left_before=int(left), proxy=Proxy.read(pem)))
        except (ToolError, ProxyError, OSError) as error:
            _log.error(event("renewal-failed", name=name, left=int(left), why=error))
            failed = True
    return int(failed)


def _class_and_voms(text: str) -> tuple[str, str]:
    name, equals, voms = text.partition("=")
    if not name or not equals or ":/" not in voms:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLASS=VO:FQAN, such as pilot=gridlab:/gridlab/Role=pilot")
    return name, voms


def _ends(path: Path) -> float:
    """Return when the proxy in ``path`` ends (seconds, Unix); 0 if there is none."""
    try:
        return Proxy.read(read_file(path)).ends
    except (OSError, ProxyError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
