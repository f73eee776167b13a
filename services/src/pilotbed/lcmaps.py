"""LCMAPS 1.6, by ctypes: what glexec's mapper and the site's mapping service ask of it.

It reads its environment and its own files, and belongs into an unprivileged process of one thread. It may live there
long: its plug-ins read their files (bans, mapfiles, leases) again at every call.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import syslog

from .lean import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_VO_MAPPING = 110  # lcmaps_cred_data.h


class LcmapsError(Exception):
    """LCMAPS does not start; the message says where to look."""


class ChainError(Exception):
    """What is said to be a certificate chain is none."""


class Posix(Record):
    """An account as LCMAPS answers it: numbers only."""

    uid: int
    gid: int
    groups: tuple[int, ...]  # secondary gids


class _VoMapping(ctypes.Structure):
    """lcmaps_vo_data.h: an FQAN and the group that the groupmapfile gives to it."""

    _fields_ = (("fqan", ctypes.c_char_p), ("group", ctypes.c_char_p), ("gid", ctypes.c_uint32))


class Lcmaps:
    """LCMAPS with one policy; one in a process, ever.

    Args:
        database: path of its db file.
        policy: name of the policy in it. Policies of a db are tried in turn until one says yes, so it has to be named.
        environment: what the library may see of an environment besides its own variables.
        debug_level: how much it logs, 0 (errors) to 5.
        log_file: where to; empty for syslog.
        gridmapdir: where the policy leases accounts; empty if it does not. One mapping at a time works there: LCMAPS
            1.6.6 refuses both of two new users who take the same account at one moment ("Two ID have grabbed the same
            pool-entry").

    Raises:
        LcmapsError: the db or the gridmapdir cannot be used.
    """

    def __init__(
        self,
        database: str,
        policy: str,
        debug_level: int = 3,
        log_file: str = "",
        environment: Mapping[str, str] | None = None,
        gridmapdir: str = "",
    ) -> None:
        self._lock = _opened(f"{gridmapdir}/.lock") if gridmapdir else -1
        # The library and OpenSSL read their environment (LCMAPS_*, VERIFY_PROXY_*, X509_VOMS_DIR).
        os.environ.clear()
        os.environ.update(environment or {})
        os.environ["LCMAPS_DB_FILE"] = database
        os.environ["LCMAPS_DEBUG_LEVEL"] = str(debug_level)
        self._policies = (ctypes.c_char_p * 1)(policy.encode())
        # RTLD_GLOBAL: its modules find the library's symbols there ("undefined symbol: lcmaps_cntArgs" otherwise).
        self.library = ctypes.CDLL("liblcmaps.so.0", mode=ctypes.RTLD_GLOBAL)
        syslog.openlog("lcmaps", syslog.LOG_PID, syslog.LOG_AUTHPRIV)  # its lines go out as the program's, "python3"
        if log_file:
            failed = self.library.lcmaps_init_and_logfile(log_file.encode(), None, ctypes.c_ushort(1))
        else:
            failed = self.library.lcmaps_init(None)  # syslog, whatever LCMAPS_LOG_FILE says
        if failed:
            raise LcmapsError(f"LCMAPS does not start: check {database} and the node's log (lcmaps)")
        self.library.getCredentialData.restype = ctypes.c_void_p

    def chain(self, pem: bytes) -> tuple[ctypes.CDLL, list[int], str]:
        """Return OpenSSL's library, the certificates of a chain in PEM form as X509*, and the name LCMAPS reads there.

        To be asked before `run_with_pem`: LCMAPS verifies the first certificate, but takes the name from the last that
        is no CA's. With the public certificate of somebody else behind one's own proxy, one was mapped as that somebody
        (1.6.6, seen). So each certificate but the last has to be signed by the one after it. Dates, issuers, revocation
        are not looked at.

        Raises:
            ChainError: it is no such chain.
        """
        crypto, chain = ctypes.CDLL("libcrypto.so.3"), ctypes.c_void_p()
        if self.library.lcmaps_pem_string_to_x509_chain(ctypes.byref(chain), ctypes.c_char_p(pem)) != 0 or not chain:
            raise ChainError("no certificate chain in PEM form")
        crypto.OPENSSL_sk_num.argtypes = [ctypes.c_void_p]
        crypto.OPENSSL_sk_value.argtypes = [ctypes.c_void_p, ctypes.c_int]
        crypto.X509_get0_pubkey.argtypes, crypto.X509_verify.argtypes = [ctypes.c_void_p], [ctypes.c_void_p] * 2
        crypto.OPENSSL_sk_value.restype = crypto.X509_get0_pubkey.restype = ctypes.c_void_p
        certificates = [crypto.OPENSSL_sk_value(chain, index) for index in range(crypto.OPENSSL_sk_num(chain))]
        for certificate, issuer in itertools.pairwise(certificates):
            if crypto.X509_verify(certificate, crypto.X509_get0_pubkey(issuer)) != 1:
                raise ChainError("these certificates are not of one chain: each must be signed by the next")
        named = self.library.lcmaps_x509_chain_to_dn
        named.argtypes, named.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_char_p
        dn = named(certificates[0], chain) or b"this proxy"
        return crypto, certificates, dn.decode(errors="replace")

    def run_with_pem(self, pem: bytes) -> Posix | None:
        """Return the account for a proxy (chain and key), or None where the policy says no; the log has the reason."""
        return self._run(self.library.lcmaps_run_with_pem_and_return_account, None, ctypes.c_char_p(pem), -1)

    def run_with_fqans(self, dn: str, fqans: tuple[str, ...]) -> Posix | None:
        """Return the account for an end-entity DN (slash form) with FQANs, the primary one first, or None."""
        listed = (ctypes.c_char_p * len(fqans))(*(fqan.encode() for fqan in fqans))
        return self._run(
            self.library.lcmaps_run_with_fqans_and_return_account, ctypes.c_char_p(dn.encode()), listed, len(fqans)
        )

    def _run(self, function: Callable[..., int], *what: object) -> Posix | None:
        uid, lease = ctypes.c_uint32(0), ctypes.c_char_p()
        primary, secondary = ctypes.POINTER(ctypes.c_uint32)(), ctypes.POINTER(ctypes.c_uint32)()
        primaries, secondaries = ctypes.c_int(0), ctypes.c_int(0)
        # The lists are the library's: it ends the process that frees them ("free(): invalid pointer").
        out = [ctypes.byref(slot) for slot in (uid, primary, primaries, secondary, secondaries, lease)]
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # the kernel lets go of it when this process dies
        try:
            refused = function(*what, None, 1, self._policies, *out)
        finally:
            if self._lock >= 0:
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        if refused or primaries.value < 1:
            return None
        groups = tuple(secondary[at] for at in range(secondaries.value))
        return Posix(uid=uid.value, gid=primary[0], groups=groups)

    def fqans(self) -> tuple[str, ...]:
        """Return the FQANs of the last run that the groupmapfile knows, in the order of the attribute certificate."""
        count = ctypes.c_int(0)
        found = self.library.getCredentialData(_VO_MAPPING, ctypes.byref(count))
        entries = ctypes.cast(found, ctypes.POINTER(_VoMapping))
        return tuple((entries[at].fqan or b"").decode(errors="replace") for at in range(count.value))


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)  # for writing: NFS locks no other
    except OSError as error:
        raise LcmapsError(f"{path}: {error.strerror}: the mapper's account must be able to write there") from None
