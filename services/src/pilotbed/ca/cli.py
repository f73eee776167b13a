"""``pilotbed-ca``: the authority's command, on its host."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .authority import CA_DAYS, PROFILES, Authority, AuthorityError, canonical

STORE = Path("/var/lib/pilotbed/ca")
PUBLISHED = Path("/srv/ca")


def ca(argv: Sequence[str] | None = None) -> int:
    """Run ``pilotbed-ca``; return its exit code."""
    arguments = _arguments(argv)
    warnings.filterwarnings("ignore", "Attribute's length")  # cryptography's, in octets: see `authority`
    authority = Authority(STORE)
    try:
        if arguments.command == "create":
            print("created" if authority.create(arguments.dn, arguments.days) else "exists")
        elif arguments.command == "show":
            print(json.dumps({"certificate": authority.pem().decode(), "hash": authority.hash()}), end="")
        elif arguments.command == "sign":
            json.dump(_signed(authority, sys.stdin.read()), sys.stdout)
        elif arguments.command == "issue":
            request, times = sys.stdin.buffer.read(), (arguments.days, arguments.not_before)
            sys.stdout.write(authority.sign(request, arguments.dn, arguments.kind, *times).decode())
        else:
            if arguments.command == "revoke":
                print(f"revoked {authority.revoke(arguments.dn)} certificates of {canonical(arguments.dn)}")
            _publish(authority, arguments.days)
    except (AuthorityError, OSError) as error:
        print(f"pilotbed-ca: {error}", file=sys.stderr)
        return 1
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pilotbed-ca", description="the grid's certificate authority")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make key and certificate, if there are none")
    create.add_argument("dn")
    create.add_argument("--days", type=float, default=CA_DAYS, help="life of the certificate (default: %(default)s)")
    commands.add_parser("show", help="print certificate and OpenSSL's name for it as JSON")
    sign = 'sign {id: {"csr", "dn", "kind"}, perhaps with "days" and "not_before"} of stdin; prints {id: certificate}'
    commands.add_parser("sign", help=sign)
    issue = commands.add_parser("issue", help="sign the request of stdin (PEM); prints the certificate")
    issue.add_argument("kind", choices=PROFILES)
    issue.add_argument("dn", help="such as /DC=test/CN=Some Body+emailAddress=some@body.test")
    issue.add_argument("--days", type=float, help="life of the certificate, also less than one")
    issue.add_argument(
        "--not-before", default="", metavar="TIME", help="when it begins, such as 2026-11-21T02:47:38 (UTC) or =-30d"
    )
    commands.add_parser("publish", help="issue a new CRL and publish it with the CA's certificate").add_argument(
        "--days", type=float, required=True, help="life of the CRL"
    )
    revoke = commands.add_parser("revoke", help="revoke every certificate of a DN and publish a new CRL")
    revoke.add_argument("dn")
    revoke.add_argument("--days", type=float, required=True, help="life of the CRL")
    return parser.parse_args(argv)


def _signed(authority: Authority, document: str) -> dict[str, str]:
    """Sign all requests of a JSON document, or none if one of them is refused. Raises AuthorityError."""
    kinds = {"csr": str, "dn": str, "kind": str, "days": int | float | None, "not_before": str}
    try:
        wanted = {key: {"days": None, "not_before": ""} | item for key, item in json.loads(document).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise AuthorityError(f'not {{id: {{"csr", "dn", "kind"}}}} in JSON: {error}') from error
    for key, item in wanted.items():
        if item.keys() != kinds.keys() or not all(isinstance(item[name], kind) for name, kind in kinds.items()):
            raise AuthorityError(f'{key}: not {{"csr", "dn", "kind"}}, perhaps with "days" and "not_before", in JSON')
    return {
        key: authority.sign(item["csr"].encode(), item["dn"], item["kind"], item["days"], item["not_before"]).decode()
        for key, item in wanted.items()
    }


def _publish(authority: Authority, days: float) -> None:
    """Put certificate, CRL and signing policy where the web server finds them, each as a whole."""
    for name, content in (("ca.pem", authority.pem()), ("ca.r0", authority.crl(days))):
        partial = PUBLISHED / f".{name}.partial"
        partial.write_bytes(content)
        partial.chmod(0o644)
        partial.rename(PUBLISHED / name)
