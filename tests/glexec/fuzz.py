"""What glexec and the mapping service parse of others' bytes, driven by coverage (atheris).

    python tests/glexec/fuzz.py READER DIRECTORY -runs=20000 DIRECTORY/corpus

READER: `configuration`, `environment` or `proxy`. The directory holds, for `proxy`, `ca`, `vomsdir` and `alice.der` of
tests/pki.py; its corpus is what to begin with, and takes what reaches more code. The other options are libFuzzer's.
Ends with an error at the first exception that is not the reader's own way to refuse, or the first result that no text
may have.
"""

import contextlib
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pilotbed"]):
    from pilotbed.glexec import policy, wrapenv
    from pilotbed.x509 import CertificateError, Chain, TrustStore, VomsStore

POOL_OR_NAME = re.compile(r"\.?[a-z_][a-z0-9_-]*")
STEERING = re.compile(r"(LD_|PYTHON|BASH_|SUDO_|GLEXEC_|LCMAPS_|X509_USER_).*|PATH|HOME|IFS|ENV")


def configuration(directory: Path) -> Callable[[bytes], None]:
    """Whatever is read has someone who may call, somewhere to map to, and no variable that steers a program."""

    def read(data: bytes) -> None:
        try:
            conf = policy.parse_conf(data.decode(errors="replace"))
        except policy.Refusal as refusal:
            assert refusal.code == policy.SYSTEM_ERROR
            return
        lists = (conf.user_white_list, conf.group_white_list, conf.pool_accounts)
        assert all(POOL_OR_NAME.fullmatch(name) for names in lists for name in names)
        assert conf.pool_accounts and (conf.user_white_list or conf.group_white_list)
        assert not any(STEERING.fullmatch(name) for name in conf.preserve_env_variables)

    return read


def environment(directory: Path) -> Callable[[bytes], None]:
    """Whatever is unwrapped leaves the account its own variables."""

    def read(data: bytes) -> None:
        with contextlib.suppress(ValueError, OSError, EOFError):
            found = wrapenv.unwrap(data.decode(errors="replace"))
            assert not {name.decode(errors="replace") for name in found} & wrapenv.ACCOUNTS_OWN

    return read


def proxy(directory: Path) -> Callable[[bytes], None]:
    """Whatever is accepted is alice, in her one group. Read as PEM, or as the DER of a proxy of hers."""
    trust = TrustStore(directory / "ca")
    voms = VomsStore(directory / "vomsdir", trust)
    alice = (directory / "alice.der").read_bytes()

    def read(data: bytes) -> None:
        with contextlib.suppress(CertificateError):
            chain = Chain.from_pem(data) if data.startswith(b"-----") else Chain.from_der([data, alice])
            with contextlib.suppress(CertificateError):  # looked at even where the proxy's own signature is broken
                assert set(voms.fqans(chain)) <= {"/gridlab"}
            assert trust.verify(chain).dn.endswith("/CN=Alice")

    return read


def main() -> None:
    reader, directory, *options = sys.argv[1:]
    warnings.simplefilter("ignore")  # cryptography warns of odd certificates that it reads
    made = {"configuration": configuration, "environment": environment, "proxy": proxy}[reader]
    atheris.Setup([sys.argv[0], *options], made(Path(directory)))
    atheris.Fuzz()


main()
