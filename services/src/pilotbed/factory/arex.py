"""Newer proxies for pilots at A-REX, by its REST interface: what HTCondor does for other computing elements.

HTCondor delegates a proxy to A-REX with each submission, and never again: in its gridmanager a job of grid type arc
that was submitted (GM_SUBMITTED in arcjob.cpp, 25.14) is looked at, cancelled and fetched, and nothing else.

ARC's REST interface, 1.0 (section Delegations): ``POST /jobs?action=delegations`` tells a job's delegations,
``POST /delegations/ID?action=renew`` answers with a certificate request for a new key, which stays there, and
``PUT /delegations/ID`` takes the proxy that was signed for it. A-REX then has it in its own files; from there
into the job's directory it is brought by the site's own means.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pilotbed.x509 import CertificateError, delegate, load_pem

#: Seconds that one step with a computing element may take: to connect, to send, until the next octets come.
DEADLINE = 20
#: Octets of an answer; a certificate request has about 1000, a job's delegations about 200.
LARGEST = 1 << 20
#: Jobs asked for in one request.
BATCH = 100

_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")


class ArexError(Exception):
    """What A-REX did not do, and why."""


class Unreachable(ArexError):
    """It could not be spoken to; nor can it about another job."""


class Arex:
    """A computing element, met with a proxy over TLS: its certificate must be for its name, and not be revoked.

    Args:
        url: of its REST interface, with the version: ``https://ce:443/arex/rest/1.0``.
        proxy: the file of the proxy that is shown, and that signs the new ones.
        certificates: directory of CAs and their CRLs, by OpenSSL's hashed names.

    Raises:
        ArexError: URL, proxy or directory cannot be used.
    """

    def __init__(self, url: str, proxy: Path, certificates: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        try:
            self._issuer = load_pem(proxy)
            context.load_verify_locations(capath=str(certificates))
            context.load_cert_chain(str(proxy))
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname or "", parts.port or http.client.HTTPS_PORT
        except (CertificateError, OSError, ValueError) as error:
            raise ArexError(f"{url} with {proxy}: {error}") from error
        self._base = parts.path.rstrip("/")
        self._connection = http.client.HTTPSConnection(host, port, timeout=DEADLINE, context=context)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def delegations(self, jobs: Sequence[str]) -> dict[str, tuple[str, ...] | str]:
        """Return the ids of each job's delegations, or the reason why A-REX tells none.

        Raises:
            ArexError: it gives no proper answer at all.
        """
        wanted = json.dumps({"job": [{"id": job} for job in jobs]}).encode()
        answer = self._ask("POST", "jobs?action=delegations", wanted, "application/json")
        try:
            said = json.loads(answer)["job"]
            # It writes a list of one like its only member.
            records = said if isinstance(said, list) else [said]
            answers = {record["id"]: record for record in records}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArexError(f"this is no list of jobs: {_shown(answer)}") from error
        return {job: _delegations(answers[job]) if job in answers else "it says nothing of this job" for job in jobs}

    def renew(self, delegation: str) -> None:
        """Put a new proxy in the place of a delegation's.

        Raises:
            ArexError: it does not take one.
        """
        path = f"delegations/{delegation}"
        request = self._ask("POST", f"{path}?action=renew")
        try:
            chain = delegate(self._issuer, request)
        except CertificateError as error:
            raise ArexError(f"delegation {delegation}: {error}") from error
        self._ask("PUT", path, chain.pem(), "application/x-pem-file")

    def _ask(self, method: str, path: str, content: bytes = b"", kind: str = "") -> bytes:
        headers = {"Accept": "application/json"} | ({"Content-Type": kind} if kind else {})
        try:
            self._connection.request(method, f"{self._base}/{path}", content, headers)
            response = self._connection.getresponse()
            answer = response.read(LARGEST + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise Unreachable(f"{method} {path}: {error or type(error).__name__}") from error
        if len(answer) > LARGEST:
            self.close()
            raise ArexError(f"{method} {path}: the answer has more than {LARGEST} octets")
        if response.status not in (http.client.OK, http.client.CREATED):
            raise ArexError(f"{method} {path}: {response.status} {_shown(response.reason.encode())} {_shown(answer)}")
        return answer


def renew(url: str, jobs: Sequence[str], proxy: Path, certificates: Path) -> dict[str, str]:
    """Have jobs of a computing element go on under ``proxy``; return by job why not, "" where they do.

    Args:
        url, proxy, certificates: see `Arex`.
        jobs: by A-REX's names.
    """
    results = {}
    try:
        arex = Arex(url, proxy, certificates)
    except ArexError as error:
        return dict.fromkeys(jobs, str(error))
    try:
        for at in range(0, len(jobs), BATCH):
            for job, found in arex.delegations(jobs[at : at + BATCH]).items():
                results[job] = found if isinstance(found, str) else _renewed(arex, found)
    except ArexError as error:
        return dict.fromkeys(jobs, str(error)) | results
    finally:
        arex.close()
    return results


def _renewed(arex: Arex, delegations: Sequence[str]) -> str:
    try:
        for delegation in delegations:
            arex.renew(delegation)
    except Unreachable:
        raise
    except ArexError as error:
        return str(error)
    return ""


def _delegations(record: Any) -> tuple[str, ...] | str:
    """Return the delegations in what A-REX says of a job, or why there are none."""
    if str(record.get("status-code")) != "200":
        return f"{record.get('status-code')} {_shown(str(record.get('reason')).encode())}"
    found = record.get("delegation_id", [])
    found = found if isinstance(found, list) else [found]
    if not found:
        return "the job has no delegation"
    if wrong := [one for one in found if not isinstance(one, str) or not _ID.fullmatch(one)]:
        return f"this is no delegation's id: {_shown(str(wrong[0]).encode())}"
    return tuple(found)


def _shown(said: bytes) -> str:
    """Return somebody else's words for a message: in one line, and not for ever."""
    return "".join(c if c.isprintable() else " " for c in said[:200].decode(errors="replace")).strip()
