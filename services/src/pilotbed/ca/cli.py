"""``pilotbed-ca``: the authority's command, on its host."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .authority import Authority, AuthorityError

STORE = Path("/var/lib/pilotbed/ca")
PUBLISHED = Path("/srv/ca")


def ca(argv: Sequence[str] | None = None) -> int:
    """Run ``pilotbed-ca``; return its exit code."""
    parser = argparse.ArgumentParser(prog="pilotbed-ca", description="the grid's certificate authority")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make key and certificate, if there are none")
    create.add_argument("dn")
    commands.add_parser("show", help="print certificate and OpenSSL's name for it as JSON")
    commands.add_parser("sign", help='sign {id: {"csr", "dn", "kind"}} of stdin; prints {id: certificate}')
    commands.add_parser("publish", help="issue a new CRL and publish it with the CA's certificate").add_argument(
        "--days", type=float, required=True, help="life of the CRL"
    )
    revoke = commands.add_parser("revoke", help="revoke every certificate of a DN and publish a new CRL")
    revoke.add_argument("dn")
    revoke.add_argument("--days", type=float, required=True, help="life of the CRL")
    arguments = parser.parse_args(argv)
    authority = Authority(STORE)
    try:
        if arguments.command == "create":
            print("created" if authority.create(arguments.dn) else "exists")
        elif arguments.command == "show":
            path = authority.certificate_path
            hashed = ["openssl", "x509", "-noout", "-subject_hash", "-in", str(path)]
            name = subprocess.run(hashed, check=True, capture_output=True, text=True).stdout.strip()
            json.dump({"certificate": path.read_text(), "hash": name}, sys.stdout)
        elif arguments.command == "sign":
            wanted = json.load(sys.stdin)
            signed = {
                key: authority.sign(item["csr"].encode(), item["dn"], item["kind"]).decode()
                for key, item in wanted.items()
            }
            json.dump(signed, sys.stdout)
        else:
            if arguments.command == "revoke":
                print(f"revoked {authority.revoke(arguments.dn)} certificates of {arguments.dn}")
            _publish(authority, arguments.days)
    except AuthorityError as error:
        print(f"pilotbed-ca: {error}", file=sys.stderr)
        return 1
    return 0


def _publish(authority: Authority, days: float) -> None:
    """Put certificate, CRL and signing policy where the web server finds them, each as a whole."""
    for name, content in (("ca.pem", authority.certificate_path.read_bytes()), ("ca.r0", authority.crl(days))):
        partial = PUBLISHED / f".{name}.partial"
        partial.write_bytes(content)
        partial.chmod(0o644)
        partial.rename(PUBLISHED / name)
