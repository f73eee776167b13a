"""The payload's environment in one variable: glexec makes a new environment, GLEXEC_ENV takes another one along.

    GLEXEC_ENV=$(glexec_wrapenv) glexec /usr/bin/glexec_unwrapenv -- command [argument...]

Both take ``--exclude=NAME[,NAME...]``, any number of times: variables that stay behind.

The format is base64 of gzip of NUL-terminated ``name=value`` entries, as in /proc/PID/environ. It is unwrapped by the
payload's own process, with no rights but the payload's.
"""

import base64
import gzip
import io
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

# Facts of the account that runs, which the account that wrapped must not overwrite.
ACCOUNTS_OWN = frozenset({"HOME", "USER", "LOGNAME", "SHELL", "X509_USER_PROXY", "_CONDOR_WRAPPER_ERROR_FILE", "_"})
LARGEST = 1 << 24  # bytes, unwrapped


def wrap(environment: Mapping[bytes, bytes]) -> str:
    """Return ``environment`` as the value of GLEXEC_ENV."""
    entries = b"".join(name + b"=" + value + b"\0" for name, value in environment.items())
    return base64.b64encode(gzip.compress(entries, mtime=0)).decode()


def unwrap(wrapped: str) -> dict[bytes, bytes]:
    """Return the environment in ``wrapped``, without what belongs to the account.

    Raises ValueError, OSError or EOFError.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(base64.b64decode(wrapped, validate=True))) as file:
            entries = file.read(LARGEST + 1)
    except zlib.error as error:  # which is none of the three
        raise ValueError(f"not gzip: {error}") from error
    if len(entries) > LARGEST:
        raise ValueError(f"more than {LARGEST} bytes")
    own = {name.encode() for name in ACCOUNTS_OWN}
    found = _parsed(entries).items()
    return {name: value for name, value in found if name not in own and not name.startswith(b"GLEXEC_")}


def _parsed(entries: bytes) -> dict[bytes, bytes]:
    found = (entry.partition(b"=") for entry in entries.split(b"\0") if b"=" in entry[1:])
    return {name: value for name, _, value in found}


def _own() -> dict[bytes, bytes]:
    """Return the environment of this program's start: Python adds LC_CTYPE to ``os.environb`` (PEP 538)."""
    return _parsed(Path("/proc/self/environ").read_bytes())


def _excluded(arguments: list[str]) -> set[bytes]:
    """Take the leading --exclude options out of ``arguments``; return the names of the variables."""
    found: set[bytes] = set()
    while arguments[:1] and arguments[0].startswith("--exclude="):
        found |= {name.encode() for name in arguments.pop(0).partition("=")[2].split(",")}
    return found


def wrap_main() -> int:
    """Print the own environment, wrapped."""
    excluded = _excluded(sys.argv[1:])
    print(wrap({name: value for name, value in _own().items() if name not in excluded}))
    return 0


def unwrap_main() -> int:
    """Execute the command in the environment that GLEXEC_ENV holds, on top of the own one."""
    command = sys.argv[1:]
    excluded = _excluded(command)
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        print("usage: glexec_unwrapenv [--exclude=NAME] -- command [argument...]", file=sys.stderr)
        return 126
    environment = _own()
    try:
        wrapped = unwrap(environment.pop(b"GLEXEC_ENV").decode()) if b"GLEXEC_ENV" in environment else {}
        environment |= {name: value for name, value in wrapped.items() if name not in excluded}
        os.execvpe(command[0], command, environment)  # noqa: S606
    except FileNotFoundError as error:
        print(f"glexec_unwrapenv: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    except (OSError, ValueError, EOFError) as error:
        print(f"glexec_unwrapenv: {command[0]}: {error}", file=sys.stderr)
    return 126
