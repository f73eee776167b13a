"""Who is it? LCMAPS under the account ``glexec``, the only part that reads the user's proxy.

LCMAPS verifies the chain, the CRLs and the VOMS attribute certificate, and takes or renews the lease of a pool account.
It is C code that parses an attacker's bytes, so it neither runs as root nor in the process that decides.
"""

import ctypes
import itertools
import os
import pwd
import resource
import struct
from dataclasses import dataclass

from .apart import PATIENCE, run_as
from .policy import AUTHORISATION_ERROR, CLIENT_ERROR, SYSTEM_ERROR, Conf, Refusal

_ANSWER = struct.Struct("=II256s256s")  # uid, gid, DN, FQAN
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
    answer = run_as(account, lambda: _answer(pem, conf))
    if len(answer) != _ANSWER.size:
        raise Refusal(SYSTEM_ERROR, "the mapper gave no answer: see the node's log (lcmaps)")
    uid, gid, dn, fqan = _ANSWER.unpack(answer)
    return Identity(uid, gid, *(raw.rstrip(b"\0").decode(errors="replace") for raw in (dn, fqan)))


def _answer(pem: bytes, conf: Conf) -> bytes:
    """Ask LCMAPS; runs in the child. Raises Refusal."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: int(PATIENCE), resource.RLIMIT_AS: 1 << 30}
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (least, least))
    # The libraries read their environment (X509_VOMS_DIR, LCMAPS_*, VERIFY_PROXY_*): nothing of it may be the caller's.
    os.environ.clear()
    os.environ["LCMAPS_DB_FILE"] = conf.lcmaps_db_file
    os.environ["LCMAPS_DEBUG_LEVEL"] = str(conf.lcmaps_debug_level)
    uid, gid, dn, fqan = _ask(pem, conf)
    return _ANSWER.pack(uid, gid, dn[:255], fqan[:255])


def _ask(pem: bytes, conf: Conf) -> tuple[int, int, bytes, bytes]:
    # RTLD_GLOBAL: LCMAPS's modules find the library's symbols there ("undefined symbol: lcmaps_cntArgs" otherwise).
    lcmaps = ctypes.CDLL("liblcmaps.so.0", mode=ctypes.RTLD_GLOBAL)
    crypto = ctypes.CDLL("libcrypto.so.3")
    chain = ctypes.c_void_p()
    if lcmaps.lcmaps_pem_string_to_x509_chain(ctypes.byref(chain), ctypes.c_char_p(pem)) != 0 or not chain:
        raise Refusal(CLIENT_ERROR, "GLEXEC_CLIENT_CERT holds no certificate chain in PEM form")
    crypto.OPENSSL_sk_num.argtypes = [ctypes.c_void_p]
    crypto.OPENSSL_sk_value.argtypes = [ctypes.c_void_p, ctypes.c_int]
    crypto.X509_get0_notAfter.argtypes = crypto.X509_cmp_current_time.argtypes = [ctypes.c_void_p]
    crypto.OPENSSL_sk_value.restype = crypto.X509_get0_notAfter.restype = ctypes.c_void_p
    certificates = [crypto.OPENSSL_sk_value(chain, index) for index in range(crypto.OPENSSL_sk_num(chain))]
    _check_chain(crypto, certificates)
    for certificate in certificates:
        if crypto.X509_cmp_current_time(crypto.X509_get0_notAfter(certificate)) < 0:
            raise Refusal(CLIENT_ERROR, "the proxy has expired: renew it")
        if conf.crl_directory:
            _check_crl(crypto, certificate, conf.crl_directory)

    if conf.lcmaps_log_file:
        failed = lcmaps.lcmaps_init_and_logfile(conf.lcmaps_log_file.encode(), None, ctypes.c_ushort(1))
    else:
        failed = lcmaps.lcmaps_init(None)  # syslog, whatever LCMAPS_LOG_FILE says
    if failed:
        reason = f"LCMAPS does not start: check {conf.lcmaps_db_file} and the node's log (lcmaps)"
        raise Refusal(SYSTEM_ERROR, reason)
    uid = ctypes.c_uint32(0)
    primary, secondary = ctypes.POINTER(ctypes.c_uint32)(), ctypes.POINTER(ctypes.c_uint32)()
    primaries, secondaries = ctypes.c_int(0), ctypes.c_int(0)
    lease = ctypes.c_char_p()
    # Policies of a db are tried in turn until one says yes, so the one that is meant is named.
    policies = (ctypes.c_char_p * 1)(conf.lcmaps_get_account_policy.encode())
    out = [ctypes.byref(slot) for slot in (uid, primary, primaries, secondary, secondaries, lease)]
    refused = lcmaps.lcmaps_run_with_pem_and_return_account(
        None, ctypes.c_char_p(pem), ctypes.c_int(-1), None, ctypes.c_int(1), policies, *out
    )
    dn, fqan = _text(lcmaps, _CREDENTIAL_DN), _text(lcmaps, _CREDENTIAL_VO_MAPPING)
    if refused or primaries.value < 1:
        who = dn.decode(errors="replace") or "this proxy"
        raise Refusal(AUTHORISATION_ERROR, f"the site gives {who} no account: see the node's log (lcmaps)")
    return uid.value, primary[0], dn, fqan


def _check_chain(crypto: ctypes.CDLL, certificates: list[int]) -> None:
    """Raise Refusal (201) unless each certificate but the last has been signed by the one after it.

    LCMAPS verifies the first one, but takes the name from the last that is no CA's: with the public certificate of
    somebody else behind one's own proxy, one was mapped as that somebody (1.6.6, seen).
    """
    crypto.X509_get0_pubkey.argtypes, crypto.X509_get0_pubkey.restype = [ctypes.c_void_p], ctypes.c_void_p
    crypto.X509_verify.argtypes = [ctypes.c_void_p] * 2
    for certificate, issuer in itertools.pairwise(certificates):
        if crypto.X509_verify(certificate, crypto.X509_get0_pubkey(issuer)) != 1:
            reason = "GLEXEC_CLIENT_CERT holds certificates that are not of one chain: each must be signed by the next"
            raise Refusal(CLIENT_ERROR, reason)


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


def _text(lcmaps: ctypes.CDLL, kind: int) -> bytes:
    """Return the first string of LCMAPS's credential data of ``kind``; a VO mapping begins with its FQAN."""
    lcmaps.getCredentialData.restype = ctypes.POINTER(ctypes.c_char_p)
    count = ctypes.c_int(0)
    found = lcmaps.getCredentialData(kind, ctypes.byref(count))
    return (found[0] or b"") if count.value else b""
