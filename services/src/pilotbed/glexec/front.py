"""/usr/sbin/glexec: the part that the caller runs, with no rights but the caller's.

It reads the command line, has sudo start the root part, passes signals on (the caller may not signal root's processes),
and ends when the payload ends. Its end, whatever the cause, is the end of the payload.
"""

from __future__ import annotations

import os
import select
import sys

from ..lean import signal, socket, suppress
from .policy import AUTHORISATION_ERROR, CANNOT_EXECUTE, CLIENT_ERROR, CONTROL, FORWARDED_SIGNALS, REFUSED, SYSTEM_ERROR

ROOT_PART = "/usr/libexec/pilotbed/glexec-root"
SUDO = "/usr/bin/sudo"
USAGE = """usage: glexec [-V] [-h] [--] command [argument...]

Runs command as the account that the site gives to the proxy in GLEXEC_CLIENT_CERT.
GLEXEC_SOURCE_PROXY, GLEXEC_TARGET_PROXY, GLEXEC_SANDBOX, GLEXEC_ENV, GLEXEC_ID: see docs/glexec.md.
Exit codes: 201 caller's error, 202 node's error, 203 not authorised (nothing ran in these cases),
204 the command exited with 201..204, 126 it could not be executed, else the command's own."""


def main() -> int:
    """Run glexec and return its exit code."""
    command = sys.argv[1:]
    if command[:1] == ["--"]:
        command = command[1:]
    elif command[:1] in (["-V"], ["-v"]):
        print("glexec 0.9 (pilotbed's, with the interface of gLExec 0.9)")
        return 0
    elif command[:1] == ["-h"]:
        print(USAGE)
        return 0
    elif command and command[0].startswith("-"):
        return _failed(CLIENT_ERROR, f"unknown option {command[0]}: see glexec -h")
    if not command:
        return _failed(CLIENT_ERROR, "no command given: see glexec -h")
    # NoNewPrivileges is inherited and for ever, and makes sudo powerless: say so in plain words.
    with open("/proc/self/status", "rb") as status:
        powerless = b"NoNewPrivs:\t1" in status.read()
    if powerless:
        return _failed(SYSTEM_ERROR, "the caller runs under NoNewPrivileges: the change of identity is impossible")
    try:
        if os.statvfs(SUDO).f_flag & os.ST_NOSUID:
            return _failed(SYSTEM_ERROR, f"{SUDO} is on a nosuid mount: the change of identity is impossible")
    except OSError as error:
        return _failed(SYSTEM_ERROR, f"{SUDO}: {error.strerror}")
    return _run(command)


def _run(command: list[str]) -> int:
    # SEQPACKET: one message is one message, and a message is never half read.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wakes, woken = socket.socketpair()
    woken.setblocking(False)
    for name in (*FORWARDED_SIGNALS, "SIGCHLD"):
        signal.signal(getattr(signal, name), lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    parent = os.getppid()
    try:
        child = os.posix_spawn(
            SUDO,
            # -C: sudo closes what is above the control socket
            [SUDO, "-n", "-C", str(CONTROL + 1), "--", ROOT_PART, *command],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), CONTROL)],
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    except OSError as error:
        return _failed(SYSTEM_ERROR, f"{SUDO}: {error.strerror}")
    theirs.close()
    watched = [wakes.fileno()]
    if parent:  # 0: it is outside this pid namespace
        with suppress(ProcessLookupError):
            watched.append(os.pidfd_open(parent))
    while True:
        ready, _, _ = select.select(watched, [], [])
        if wakes.fileno() in ready:
            for number in wakes.recv(64):
                if number == signal.SIGCHLD:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    if ended:
                        return _verdict(ours, status)
                else:
                    with suppress(OSError):
                        ours.send(bytes([number]))
        if os.getppid() != parent:
            return 128 + signal.SIGHUP  # the caller is dead, and with our end of the socket goes the payload


def _verdict(ours: socket.socket, status: int) -> int:
    """Return the exit code: the root part has said by a message whether it is glexec's own or the payload's."""
    code = os.waitstatus_to_exitcode(status)
    ours.setblocking(False)
    message = b""
    with suppress(BlockingIOError):
        while True:
            try:
                part = ours.recv(4096)
            except ConnectionResetError:  # it ended before it had read our last signal; told once, before its words
                continue
            if not part:
                break
            message = part
    if message[:1] == REFUSED and len(message) > 1:
        return _failed(message[1], message[2:].decode(errors="replace"))
    if not message:
        return _failed(AUTHORISATION_ERROR, "sudo does not let this account use glexec: see the node's log (sudo)")
    if code < 0:
        return _failed(SYSTEM_ERROR, f"the root part was killed by signal {-code}")
    return code


def _failed(code: int, reason: str) -> int:
    """Say that glexec itself failed; to HTCondor's starter too, which then neither counts nor ends the job.

    _CONDOR_WRAPPER_ERROR_FILE is how a USER_JOB_WRAPPER reports that it could not start the job: the job goes back to
    the queue and the reason into its event log.
    """
    print(f"glexec: {reason}", file=sys.stderr)
    path = os.environ.get("_CONDOR_WRAPPER_ERROR_FILE")
    if path and code != CANNOT_EXECUTE:  # a command that cannot be executed is the job's own fault
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW  # the payload may have put a link there
        with suppress(OSError), open(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(f"glexec {code}: {reason}\n")
    return code
