"""Who is it? Asked under the account ``glexec``, in the only parts of glexec that read what others have written.

LCMAPS verifies the chain, the CRLs and the VOMS attribute certificate. It is C code that parses an attacker's bytes, so
it neither runs as root nor in the process that decides. The account then comes from LCMAPS, too (``mapping = local``),
or from the site's mapping service, which is asked about the verified DN and FQANs by a second process.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import struct

from ..lean import Record
from ..mapping import LARGEST_DN
from .apart import PATIENCE, run_as
from .policy import AUTHORISATION_ERROR, CLIENT_ERROR, SYSTEM_ERROR, Conf, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pilotbed.lcmaps import Lcmaps

_ANSWER = struct.Struct(f"=II{LARGEST_DN}s256s")  # uid, gid, DN, FQAN


class Identity(Record):
    """What is known about a proxy: end-entity DN, primary FQAN and the account for them."""

    uid: int
    gid: int
    dn: str
    fqan: str


def identify(pem: bytes, conf: Conf, account: pwd.struct_passwd) -> Identity:
    """Return the identity behind ``pem`` (proxy chain with private key), as the site sees it; work is ``account``'s.

    Raises Refusal: 201 where the proxy cannot be read or has expired, 203 where LCMAPS or the mapping service refuses
    it or the service has no answer in time, 202 where LCMAPS fails, crashes or takes longer than PATIENCE. The text of
    DN and FQAN is untrusted: it is for the log only.
    """
    if conf.mapping == "service":
        user = run_as(account, lambda: _verified(pem, conf))  # not looked at here, but handed on
        try:
            answer = run_as(account, lambda: _asked(user, conf), patience=conf.mapping_timeout)
        except Refusal as refusal:
            if refusal.code == AUTHORISATION_ERROR:
                raise
            late = f"the mapping service {conf.mapping_service} gave no answer within {conf.mapping_timeout} s"
            raise Refusal(AUTHORISATION_ERROR, late) from refusal
    else:
        answer = run_as(account, lambda: _answer(pem, conf))
    if len(answer) != _ANSWER.size:
        raise Refusal(SYSTEM_ERROR, "the mapper gave no answer: see the node's log (lcmaps)")
    uid, gid, dn, fqan = _ANSWER.unpack(answer)
    dn, fqan = (raw.rstrip(b"\0").decode(errors="replace") for raw in (dn, fqan))
    return Identity(uid=uid, gid=gid, dn=dn, fqan=fqan)


# What follows runs in children that are the account. Nothing above imports what they need: root does without.


def _packed(uid: int, gid: int, dn: str, fqans: tuple[str, ...]) -> bytes:
    if len(dn.encode()) > LARGEST_DN:  # what was cut off would be missing in the records, and in a ban
        raise Refusal(AUTHORISATION_ERROR, f"a DN of more than {LARGEST_DN} characters: {dn[:80]}…")
    return _ANSWER.pack(uid, gid, dn.encode(), fqans[0].encode()[:255] if fqans else b"")


def _answer(pem: bytes, conf: Conf) -> bytes:
    """Have LCMAPS verify the proxy and name its account. Raises Refusal."""
    lcmaps, dn = _lcmaps(pem, conf)
    found = lcmaps.run_with_pem(pem)
    if not found:
        raise Refusal(AUTHORISATION_ERROR, f"the site gives {dn} no account: see the node's log (lcmaps)")
    return _packed(found.uid, found.gid, dn, lcmaps.fqans())


def _verified(pem: bytes, conf: Conf) -> bytes:
    """Have LCMAPS verify the proxy; return DN and FQANs as the mapping service is asked about them. Raises Refusal."""
    from pilotbed.mapping import json_face, model

    lcmaps, dn = _lcmaps(pem, conf)
    if not lcmaps.run_with_pem(pem):  # the account of this policy is nobody: only its yes or no counts
        reason = f"the proxy of {dn}, or its VOMS part, is not valid here: see the node's log (lcmaps)"
        raise Refusal(AUTHORISATION_ERROR, reason)
    try:
        return json_face.request(model.Subject(dn, lcmaps.fqans()))
    except model.BadRequest as error:
        raise Refusal(AUTHORISATION_ERROR, str(error)) from error


def _lcmaps(pem: bytes, conf: Conf) -> tuple[Lcmaps, str]:
    """Return LCMAPS, and the end-entity DN of ``pem``, which LCMAPS has still to verify. Raises Refusal."""
    from pilotbed.lcmaps import ChainError, Lcmaps, LcmapsError

    _confine()
    try:
        lcmaps = Lcmaps(
            conf.lcmaps_db_file, conf.lcmaps_get_account_policy, conf.lcmaps_debug_level, conf.lcmaps_log_file,
            gridmapdir=conf.gridmapdir if conf.mapping == "local" else "",
        )  # fmt: skip
    except LcmapsError as error:
        raise Refusal(SYSTEM_ERROR, str(error)) from error
    try:
        crypto, certificates, dn = lcmaps.chain(pem)
    except ChainError as error:
        raise Refusal(CLIENT_ERROR, f"GLEXEC_CLIENT_CERT: {error}") from error
    crypto.X509_get0_notAfter.argtypes = crypto.X509_cmp_current_time.argtypes = [ctypes.c_void_p]
    crypto.X509_get0_notAfter.restype = ctypes.c_void_p
    for certificate in certificates:
        if crypto.X509_cmp_current_time(crypto.X509_get0_notAfter(certificate)) < 0:
            raise Refusal(CLIENT_ERROR, "the proxy has expired: renew it")
        if conf.crl_directory:
            _check_crl(crypto, certificate, conf.crl_directory)
    return lcmaps, dn


def _check_crl(crypto: ctypes.CDLL, certificate: int, directory: str) -> None:
    """Raise Refusal (202) if the certificate's issuer is a CA of the ``directory`` without a CRL that can be read.

    LCMAPS takes such a CRL for none, and whoever is on it for good. Validity and signature are LCMAPS's affair.
    """
    crypto.X509_issuer_name_hash.argtypes = [ctypes.c_void_p]
    crypto.X509_issuer_name_hash.restype = ctypes.c_ulong
    crypto.BIO_new_file.restype = crypto.PEM_read_bio_X509_CRL.restype = ctypes.c_void_p
    crypto.PEM_read_bio_X509_CRL.argtypes = [ctypes.c_void_p] * 4
    name = f"{directory}/{crypto.X509_issuer_name_hash(certificate):08x}"
    if not os.path.exists(f"{name}.0"):  # noqa: PTH110
        return  # the issuer is no CA: a proxy's is its user; if it is an unknown one, LCMAPS says so
    file = crypto.BIO_new_file(f"{name}.r0".encode(), b"r")
    if not file or not crypto.PEM_read_bio_X509_CRL(file, None, None, None):
        raise Refusal(SYSTEM_ERROR, f"the CRL {name}.r0 is missing or cannot be read: see pilotbed-fetch-crl")


def _asked(user: bytes, conf: Conf) -> bytes:
    """Ask the mapping service for the account. Raises Refusal (203)."""
    from pathlib import Path

    from pilotbed.mapping import json_face
    from pilotbed.mapping.client import Client, ServiceError

    _confine()
    subject, credential = json_face.subject(user), Path(conf.mapping_credential)
    client = Client(
        conf.mapping_service, credential / "cert.pem", credential / "key.pem", Path(conf.crl_directory),
        conf.mapping_timeout,
    )  # fmt: skip
    try:
        answer = client.ask(subject)
    except ServiceError as error:
        raise Refusal(AUTHORISATION_ERROR, f"the mapping service does not answer: {error}") from error
    account = answer.account
    if not account:
        raise Refusal(AUTHORISATION_ERROR, answer.reason)
    try:
        here = pwd.getpwnam(account.name).pw_uid
    except KeyError:
        here = None
    if here != account.uid:
        reason = f"the mapping service answers {account.name} with uid {account.uid}, which has uid {here} on this node"
        raise Refusal(AUTHORISATION_ERROR, reason)
    return _packed(account.uid, account.gid, subject.dn, subject.fqans)


def _confine() -> None:
    """Take from this process what it does not need."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: int(PATIENCE), resource.RLIMIT_AS: 1 << 30}
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (least, least))
    os.environ.clear()  # libraries read it: nothing of it may be the caller's
