"""What a call of glexec costs beside bare sudo, and where its time goes: a part of `make bench-glexec`.

The bed's programs are given marks, which the installed ones have not.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

from pilotbed_lab import LabError
from pilotbed_suite import document

from ..run import middle, ratio

ROUNDS, WARM_UP = 40, 3
PARALLEL = 50
#: MB that a waiting root process may have.
MEMORY_AIM = 12.0
#: How much longer than sudo and a bare Python glexec may take, without the mapping.
RATIO_AIM = 1.5

#: A further name of python3's, for sudo with the defaults that glexec's own rule has.
LEAN = "/usr/bin/python3-lean"
#: What is run: name, and arguments.
COMMANDS = {
    "sudo true": ["/usr/bin/sudo", "-n", "/usr/bin/true"],
    "sudo python3": ["/usr/bin/sudo", "-n", "/usr/bin/python3", "-I", "-c", "pass"],
    "lean python3": ["/usr/bin/sudo", "-n", LEAN, "-I", "-c", "pass"],
    "glexec": ["/usr/sbin/glexec", "/usr/bin/true"],
}
SUDOERS = f"""
Defaults!{LEAN} env_reset, !requiretty, !use_pty, !pam_session, !pam_setcred, !log_allowed
%glpilot ALL=(root) NOPASSWD: /usr/bin/true, /usr/bin/python3, {LEAN}
"""

#: Marks of one call, in order: what was done between the one before and this one.
PARTS = {
    "front": "front end: start of Python",
    "front imports": "front end: its imports",
    "root": "front end's work, sudo, start of Python",
    "root imports": "root part: its imports",
    "decide": "configuration, checks, opening the proxy as the caller",
    "mapped": "LCMAPS in its child",
    "supervise": "the rest of the decision",
    "monitor": "entry, cgroup, fork of the monitor",
    "executed": "monitor: to the payload's exec",
    "ended": "the payload itself",
    "cleaned": "clean-up",
    "end": "log line, ends of root part, sudo and front end",
}
MARKS = "/srv/work/marks"
_MARK = f"""
def _mark(name, time=__import__("time"), os=__import__("os")):
    file = os.open({MARKS!r}, os.O_WRONLY | os.O_APPEND)
    os.write(file, f"{{name}} {{time.monotonic_ns()}}\\n".encode())
    os.close(file)
"""
_WRAP = """
import pilotbed.glexec.root as _root
def _wrap(module, name, before, after):
    function = getattr(module, name)
    def wrapped(*arguments):
        if before: _mark(before)
        try:
            return function(*arguments)
        finally:
            if after: _mark(after)
    setattr(module, name, wrapped)
_wrap(_root.mapper, "identify", "decide", "mapped")
_wrap(_root, "_supervise", "supervise", None)
_wrap(_root.monitor, "start", "monitor", "executed")
_wrap(_root, "_clean_up", "ended", "cleaned")
"""

#: Runs as a pilot in the bed: {"commands", "rounds", "parallel"} on standard input; seconds and failures out.
DRIVER = r"""
import json, os, sys, time
asked = json.load(sys.stdin)
null = os.open("/dev/null", os.O_RDWR)
def start(argv):
    return os.posix_spawn(argv[0], argv, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)])
names, found = list(asked["commands"]), []
for turn in range(asked["rounds"]):
    took = {}
    for name in names[turn % len(names):] + names[:turn % len(names)]:
        began = time.monotonic_ns()
        status = os.waitpid(start(asked["commands"][name]), 0)[1]
        took[name] = [began, time.monotonic_ns()]
        if status:
            sys.exit(f"{name}: status {status}")
    found.append(took)
began = time.monotonic()
pids = [start(asked["commands"]["glexec"]) for _ in range(asked["parallel"])]
failures = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
json.dump({"rounds": found, "failures": failures, "parallel_seconds": time.monotonic() - began}, sys.stdout)
"""


def marked(text: str, first: str, then: str, wrap: str = "") -> str:
    """Return an entry script with marks: ``first`` before its imports, ``then`` after them.

    Raises:
        LabError: it does not end with `sys.exit(main())`.
    """
    head, found, rest = text.rpartition("sys.exit(main())")
    if not found or rest.strip():
        raise LabError("the entry script is not as the bench knows it: it must end with sys.exit(main())")
    line, _, body = head.partition("\n")
    return f"{line}\n{_MARK}_mark({first!r})\n{body}_mark({then!r})\n{wrap}{found}\n"


def parts(took: Sequence[int], marks: dict[str, int]) -> dict[str, float]:
    """Return milliseconds of the parts of one call, which began and ended at ``took`` (ns), from its ``marks``."""
    before, found = took[0], {}
    for name in PARTS:
        at = took[1] if name == "end" else marks[name]
        found[name] = (at - before) / 1e6
        before = at
    return found


def samples(rounds: Sequence[dict[str, Sequence[int]]], marks: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Return a sample a round: milliseconds of each command, of glexec up to the payload's exec, and of its parts."""
    found = []
    for took in rounds:
        began, ended = took["glexec"]
        split = parts(took["glexec"], {name: at for name, at in marks if began <= at <= ended})
        to_exec = sum(split[name] for name in list(PARTS)[: list(PARTS).index("executed") + 1])
        whole: dict[str, Any] = {name: (after - before) / 1e6 for name, (before, after) in took.items()}
        found.append(whole | {"to exec": to_exec, "without mapping": to_exec - split["mapped"], "parts": split})
    return found


def memory(bed: Any, proxy: str) -> list[dict[str, float]]:
    """Return the memory in MB of the root processes of a waiting call: supervisor and monitor."""
    call = bed.start("/usr/sbin/glexec", "/bin/sh", "-c", "echo up; read -r _", env={"GLEXEC_CLIENT_CERT": proxy})
    assert call.stdout is not None
    if call.stdout.readline() != "up\n":
        raise LabError(f"glexec does not run a payload: {call.communicate()}")
    keys, found = {"Rss": "rss", "Pss": "pss", "Private_Dirty": "private"}, []
    for pid, (account, arguments) in sorted(bed.processes().items()):
        if account == "root" and "glexec-root" in arguments and "sudo" not in arguments:
            lines = bed.path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            fields = {line.partition(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
            found.append({name: fields[key] for key, name in keys.items()})
    bed.finish(call, input="\n")
    if len(found) != 2:
        raise LabError(f"a waiting call has {len(found)} root processes, not supervisor and monitor")
    return found


def measure(bed: Any, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return what was found. Raises LabError."""
    module = importlib.import_module("glexecbed")
    proxy = bed.write(f"{bed.directory()}/proxy", bed.proxy())
    bed.write("/etc/sudoers.d/bench", SUDOERS, owner="root", mode=0o440)
    bed.root(f"ln -s python3 {LEAN}")
    waiting = memory(bed, proxy)
    bed.write(MARKS, "", owner="root", mode=0o666)
    with (
        bed.changed(module.GLEXEC, lambda text: marked(text, "front", "front imports")),
        bed.changed(module.ROOT_PART, lambda text: marked(text, "root", "root imports", _WRAP)),
    ):
        asked = {"commands": COMMANDS, "rounds": WARM_UP + rounds, "parallel": PARALLEL}
        driver = bed.start("python3", "-I", "-c", DRIVER, env={"GLEXEC_CLIENT_CERT": proxy})
        out, err = driver.communicate(json.dumps(asked), timeout=600)
    if driver.returncode:
        raise LabError(f"measuring failed: {err}{bed.log()[-5:]}")
    found = json.loads(out)
    lines = (line.rpartition(" ") for line in bed.path(MARKS).read_text().splitlines())
    return {
        "samples": samples(found["rounds"][WARM_UP:], [(name, int(at)) for name, _, at in lines]),
        "memory": waiting,
        "parallel": {"calls": PARALLEL, "failures": found["failures"], "seconds": found["parallel_seconds"]},
    }


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    taken, parallel = found["samples"], found["parallel"]
    split = [sample["parts"] for sample in taken]
    compared = [("sudo -n /usr/bin/true", "sudo true"), ("sudo -n python3 -I -c pass", "sudo python3"),
                ("the same, sudo without pty and PAM session", "lean python3"),
                ("glexec /usr/bin/true, start to exec", "to exec"), ("the same without the mapping", "without mapping"),
                ("glexec /usr/bin/true, start to end", "glexec")]  # fmt: skip
    beside, most = ratio(taken, "without mapping", "sudo python3"), max(each["rss"] for each in found["memory"])
    aims = [
        (f"start to exec without the mapping, beside sudo and a bare Python (up to {RATIO_AIM})",
         f"{beside:.2f}", beside <= RATIO_AIM),
        (f"failures of {parallel['calls']} calls at once, which took {parallel['seconds']:.1f} s",
         str(parallel["failures"]), not parallel["failures"]),
        (f"resident memory of a waiting root process, the larger one, MB (up to {MEMORY_AIM:.0f})",
         f"{most:.1f}", most <= MEMORY_AIM),
    ]  # fmt: skip
    return "\n".join([
        f"Medians of {len(taken)} alternating rounds; ratios are made within a round.",
        "",
        *document.table(["", "ms", "/ sudo python3", "/ the lean one", "/ sudo true"], [
            [what, f"{middle(taken, name):.1f}",
             *(f"{ratio(taken, name, other):.2f}" for other in ("sudo python3", "lean python3", "sudo true"))]
            for what, name in compared]),
        "",
        *document.table(["part of a call", "ms"],
                        [[what, f"{middle(split, name):.1f}"] for name, what in PARTS.items()]),
        "",
        *document.table(["memory of a waiting call, MB", "resident", "proportional", "private and written"], [
            [name, *(f"{process[key]:.1f}" for key in ("rss", "pss", "private"))]
            for name, process in zip(("supervisor", "monitor"), found["memory"], strict=True)]),
        "",
        *document.aims(aims),
    ])  # fmt: skip
