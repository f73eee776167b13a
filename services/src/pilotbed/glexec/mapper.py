"""Who is it? LCMAPS in a child that has become the account ``glexec``, the only part that reads the user's proxy.

LCMAPS verifies the chain, the CRLs and the VOMS attribute certificate, and takes or renews the lease of a pool account.
It is C code that parses an attacker's bytes, so it neither runs as root nor in the process that decides.
"""

import contextlib
import ctypes
import itertools
import os
import pwd
import resource
import select
import signal
import struct
import time
from dataclasses import dataclass

from .policy import AUTHORISATION_ERROR, CLIENT_ERROR, SYSTEM_ERROR, Conf, Refusal

PATIENCE = 30.0  # seconds; a mapping takes 0.02
_ANSWER = struct.Struct("=BII256s256s")  # verdict, uid, gid, DN, FQAN
_MAPPED, _EXPIRED, _UNREADABLE, _REFUSED, _BROKEN, _MIXED = range(6)
_CREDENTIAL_DN, _CREDENTIAL_VO_MAPPING = 5, 110  # lcmaps_cred_data.h


@dataclass(frozen=True)
class Identity:
    """What LCMAPS says about a proxy: end-entity DN, primary FQAN and the account for them."""

    uid: int
    gid: int
    dn: str
    fqan: str


def identify(pem: bytes, conf: Conf, account: pwd.struct_passwd) -> Identity:
    """Return the identity behind ``pem`` (proxy chain with private key), as LCMAPS sees it when it runs as ``account``.

    Raises Refusal: 201 where the proxy cannot be read or has expired, 203 where LCMAPS refuses it, 202 where LCMAPS
    fails, crashes or takes longer than PATIENCE. The text of DN and FQAN is untrusted: it is for the log only.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(reader)
            os.write(writer, _answer(pem, conf, account))
        os._exit(0)
    os.close(writer)
    try:
        answer = _read(reader, time.monotonic() + PATIENCE)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if len(answer) != _ANSWER.size:
        raise Refusal(SYSTEM_ERROR, "the LCMAPS mapper crashed or did not answer in time: see the node's log (lcmaps)")
    verdict, uid, gid, raw_dn, raw_fqan = _ANSWER.unpack(answer)
    dn, fqan = (raw.rstrip(b"\0").decode(errors="replace") for raw in (raw_dn, raw_fqan))
    if verdict == _EXPIRED:
        raise Refusal(CLIENT_ERROR, "the proxy has expired: renew it")
    if verdict == _MIXED:
        reason = "GLEXEC_CLIENT_CERT holds certificates that are not of one chain: each must be signed by the next"
        raise Refusal(CLIENT_ERROR, reason)
    if verdict == _UNREADABLE:
        raise Refusal(CLIENT_ERROR, "GLEXEC_CLIENT_CERT holds no certificate chain in PEM form")
    if verdict == _BROKEN:
        raise Refusal(SYSTEM_ERROR, f"LCMAPS does not start: check {conf.lcmaps_db_file} and the node's log (lcmaps)")
    if verdict != _MAPPED:
        who = dn or "this proxy"
        raise Refusal(AUTHORISATION_ERROR, f"the site gives {who} no account: see the node's log (lcmaps)")
    return Identity(uid, gid, dn, fqan)


def _read(descriptor: int, deadline: float) -> bytes:
    """Return what arrives at ``descriptor`` until its end, until one answer is there, or until ``deadline``."""
    answer = b""
    while len(answer) < _ANSWER.size:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(descriptor, _ANSWER.size - len(answer)) if ready else b""
        if not part:
            break
        answer += part
    return answer


def _answer(pem: bytes, conf: Conf, account: pwd.struct_passwd) -> bytes:
    """Become ``account`` for good and ask LCMAPS; runs in the child."""
    os.setgroups([])
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: int(PATIENCE), resource.RLIMIT_AS: 1 << 30}
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    # The libraries read their environment (X509_VOMS_DIR, LCMAPS_*, VERIFY_PROXY_*): nothing of it may be the caller's.
    os.environ.clear()
    os.environ["LCMAPS_DB_FILE"] = conf.lcmaps_db_file
    os.environ["LCMAPS_DEBUG_LEVEL"] = str(conf.lcmaps_debug_level)
    if conf.lcmaps_log_file:
        os.environ["LCMAPS_LOG_FILE"] = conf.lcmaps_log_file
    verdict, uid, gid, dn, fqan = _ask(pem)
    return _ANSWER.pack(verdict, uid, gid, dn[:255], fqan[:255])


def _ask(pem: bytes) -> tuple[int, int, int, bytes, bytes]:
    # RTLD_GLOBAL: LCMAPS's modules find the library's symbols there ("undefined symbol: lcmaps_cntArgs" otherwise).
    lcmaps = ctypes.CDLL("liblcmaps.so.0", mode=ctypes.RTLD_GLOBAL)
    crypto = ctypes.CDLL("libcrypto.so.3")
    chain = ctypes.c_void_p()
    if lcmaps.lcmaps_pem_string_to_x509_chain(ctypes.byref(chain), ctypes.c_char_p(pem)) != 0 or not chain:
        return _UNREADABLE, 0, 0, b"", b""
    crypto.OPENSSL_sk_num.argtypes = [ctypes.c_void_p]
    crypto.OPENSSL_sk_value.argtypes = [ctypes.c_void_p, ctypes.c_int]
    crypto.X509_get0_notAfter.argtypes = crypto.X509_cmp_current_time.argtypes = [ctypes.c_void_p]
    crypto.OPENSSL_sk_value.restype = crypto.X509_get0_notAfter.restype = ctypes.c_void_p
    certificates = [crypto.OPENSSL_sk_value(chain, index) for index in range(crypto.OPENSSL_sk_num(chain))]
    # LCMAPS 1.6.6 verifies the first certificate, but takes the name from the last that is no CA's: with the public
    # certificate of somebody else behind one's own proxy, one was mapped as that somebody.
    crypto.X509_get0_pubkey.argtypes, crypto.X509_get0_pubkey.restype = [ctypes.c_void_p], ctypes.c_void_p
    crypto.X509_verify.argtypes = [ctypes.c_void_p] * 2
    for certificate, issuer in itertools.pairwise(certificates):
        if crypto.X509_verify(certificate, crypto.X509_get0_pubkey(issuer)) != 1:
            return _MIXED, 0, 0, b"", b""
    for certificate in certificates:
        if crypto.X509_cmp_current_time(crypto.X509_get0_notAfter(certificate)) < 0:
            return _EXPIRED, 0, 0, b"", b""

    if lcmaps.lcmaps_init(None) != 0:
        return _BROKEN, 0, 0, b"", b""
    uid = ctypes.c_uint32(0)
    primary, secondary = ctypes.POINTER(ctypes.c_uint32)(), ctypes.POINTER(ctypes.c_uint32)()
    primaries, secondaries = ctypes.c_int(0), ctypes.c_int(0)
    lease = ctypes.c_char_p()
    # Policies of a db are tried in turn until one says yes, so the one that is meant is named.
    policies = (ctypes.c_char_p * 1)(b"glexec")
    out = [ctypes.byref(slot) for slot in (uid, primary, primaries, secondary, secondaries, lease)]
    refused = lcmaps.lcmaps_run_with_pem_and_return_account(
        None, ctypes.c_char_p(pem), ctypes.c_int(-1), None, ctypes.c_int(1), policies, *out
    )
    dn, fqan = _text(lcmaps, _CREDENTIAL_DN), _text(lcmaps, _CREDENTIAL_VO_MAPPING)
    if refused or primaries.value < 1:
        return _REFUSED, 0, 0, dn, fqan
    return _MAPPED, uid.value, primary[0], dn, fqan


def _text(lcmaps: ctypes.CDLL, kind: int) -> bytes:
    """Return the first string of LCMAPS's credential data of ``kind``; a VO mapping begins with its FQAN."""
    lcmaps.getCredentialData.restype = ctypes.POINTER(ctypes.c_char_p)
    count = ctypes.c_int(0)
    found = lcmaps.getCredentialData(kind, ctypes.byref(count))
    return (found[0] or b"") if count.value else b""
