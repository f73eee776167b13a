"""pilotbed-pilot-credential: makes the pilots' proxy from the robot certificate, and leaves a renewable one in MyProxy.

It runs under an account of its own, which alone is handed the robot's key; the frontend sees only the proxy.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pilotbed.files import replace_file
from pilotbed.gridtools import ToolError, own_copy, run
from pilotbed.proxy import Proxy, ProxyError
from pilotbed.service import event, set_up_logging

_log = logging.getLogger("pilotbed.credential")

#: Life of the credential in MyProxy, in hours: how long a frontend may be away before its pilots' proxies end.
STORED_HOURS = 168


def store(certificate: Path, key: Path, server: str, renewer: str, credential: str, *, hours: int) -> None:
    """Leave a credential of STORED_HOURS in MyProxy that only ``renewer`` (a DN) may renew from, ``hours`` at a time.

    Raises:
        ToolError: the server refused it.
    """
    # -x must come before -R: otherwise the policy becomes "*/CN=<DN>", which never matches, and renewals are refused
    # with "no passphrase / authentication failed".
    command = ["myproxy-init", "-s", server, "-d", "-n", "-x", "-R", renewer, "-k", credential]
    run([*command, "-c", str(STORED_HOURS), "-t", str(hours)], {"X509_USER_CERT": certificate, "X509_USER_KEY": key})


def make_proxy(certificate: Path, key: Path, voms: str, hours: int) -> str:
    """Return a new proxy (PEM) with the VOMS attributes ``voms`` (``VO:FQAN``).

    Raises:
        ToolError: the VOMS server refused.
    """
    with tempfile.TemporaryDirectory(prefix="pilot") as directory:
        out = Path(directory, "proxy.pem")
        own = ["-cert", str(certificate), "-key", str(key)]
        run(["voms-proxy-init", "-quiet", *own, "-voms", voms, "-valid", f"{hours}:00", "-out", str(out)], {})
        return out.read_text()


def main(argv: Sequence[str] | None = None) -> int:
    """Store and make once; return 1 if either failed."""
    parser = argparse.ArgumentParser(
        prog="pilotbed-pilot-credential", description="Make the pilots' proxy and store a renewable one in MyProxy."
    )
    parser.add_argument("--myproxy", required=True, metavar="HOST", help="MyProxy server")
    parser.add_argument("--renewer", required=True, metavar="DN", help="end-entity DN of who renews")
    parser.add_argument("--credential", default="pilot", help="name of the stored credential (default: pilot)")
    parser.add_argument("--voms", required=True, metavar="VO:FQAN", help="attributes of the proxy")
    parser.add_argument("--hours", type=int, default=24, help="life of the proxy (default: 24)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the proxy, for the frontend")
    options = parser.parse_args(argv)
    set_up_logging()
    given = Path(os.environ.get("CREDENTIALS_DIRECTORY", ""))
    if not given.is_absolute():
        _log.error("CREDENTIALS_DIRECTORY is not set: start this as pilotbed-pilot-credential.service")
        return 2
    with tempfile.TemporaryDirectory(prefix="pilot") as directory:
        try:
            certificate, key = (own_copy(given / name, Path(directory)) for name in ("cert.pem", "key.pem"))
        except OSError as error:
            _log.error(event("no-certificate", why=error))
            return 1
        return _make_and_store(options, certificate, key)


def _make_and_store(options: argparse.Namespace, certificate: Path, key: Path) -> int:
    failed = False
    try:
        pem = make_proxy(certificate, key, options.voms, options.hours)
        replace_file(options.out, pem, 0o640)
        _log.info(event("proxy", file=options.out, proxy=Proxy.read(pem)))
    except (ToolError, ProxyError, OSError) as error:
        _log.error(event("proxy-failed", voms=options.voms, why=error))
        failed = True
    try:
        store(certificate, key, options.myproxy, options.renewer, options.credential, hours=options.hours)
        _log.info(event("stored", myproxy=options.myproxy, credential=options.credential, renewer=options.renewer))
    except ToolError as error:
        _log.error(event("store-failed", myproxy=options.myproxy, why=error))
        failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
