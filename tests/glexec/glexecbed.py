"""A worker node without a grid: a root over the node image, where the role `worker` has installed glexec.

     this host                          │ the bed: mount, network, process, IPC and cgroup namespaces
     pytest ─ bed.run(…) ── nsenter ────┼─▶ pilot001 ─ glexec ─ sudo ─ glexec-root ─ payload (gl001, …)
     CA, VOMS, proxies (tests/pki.py) ──┼─▶ /etc/grid-security, /srv/work/…
     reader of the log ◀────────────────┼── /dev/log

Installed by Ansible from the role itself, so that what is tested is what a site gets. LCMAPS, sudo and VOMS are real.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pki
from pilotbed.glexec import policy
from pilotbed_lab import enclosure, image
from pilotbed_suite import CHECKOUT, ansible

GLEXEC = "/usr/sbin/glexec"
ROOT_PART = "/usr/libexec/pilotbed/glexec-root"
SOURCES = "/usr/lib/pilotbed/pilotbed/glexec"
CONF = "/etc/glexec.conf"
GRIDMAPDIR = "/srv/site/gridmapdir"
TRUST = "/etc/grid-security/certificates"
PEOPLE = "/DC=test/DC=grid/O=Gridlab/OU=People/CN="
VOMS = "/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=voms.grid.test"
PILOT, OTHER_PILOT = "pilot001", "pilot002"
#: First and last uid of the payloads' accounts, .gl.
POOL = (21001, 21020)
DEADLINE = 180

#: First process: waits for nothing but orphans, which the kernel then buries by itself.
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True)\nwhile 1: signal.pause()"

PLAY = """
- name: The bed
  hosts: worker
  gather_facts: false
  vars: %s
  pre_tasks:
    - ansible.builtin.raw: dpkg-query --show --showformat '${Package}\\n'
      register: packages
    - ansible.builtin.set_fact: {node_packages: "{{ packages.stdout_lines | map('trim') | list }}", cacheable: true}
  roles: [%s]
"""
HOSTS = """
all:
  hosts:
    bed:
      ansible_connection: nsenter
      ansible_nsenter_leaders: "%s"
      # Of a host, as inventory/common says something for all of them.
      pool_accounts_make_shared: true
      batch_system_name: slurm
  children: {worker: {hosts: {bed: }}, site_bed: {hosts: {bed: }, vars: {site_name: bed}}}
"""

#: How the payload's processes are held together, by what the node offers: commands before the call, as root.
CGROUPS = {
    "writable": "",
    "read-only": "mount -o remount,bind,ro /sys/fs/cgroup",
    "absent": "umount /sys/fs/cgroup",
}


@dataclass(frozen=True)
class Done:
    """A command that has ended, and what the node's log got meanwhile."""

    code: int
    out: str
    err: str
    log: list[str]

    def line(self) -> str:
        """Return glexec's one line of this call."""
        found = [line for line in self.log if line.startswith("glexec[") and "]: caller=" in line]
        assert len(found) == 1, f"not one line of glexec's: {self}"
        return found[0]

    def field(self, name: str) -> str:
        """Return a field of glexec's line."""
        before, found, rest = self.line().partition(f" {name}=")
        assert found, f"no {name} in {before}"
        return rest[1:].partition('"')[0] if rest.startswith('"') else rest.partition(" ")[0]


def until(what: str, look: Callable[[], object], deadline: float = DEADLINE) -> object:
    """Return what `look` finds as soon as it is true."""
    end = time.monotonic() + deadline
    while not (found := look()):
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        time.sleep(0.02)
    return found


class Bed:
    """See the module. `close` leaves nothing of it."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._scratch = directory / "root"
        self._scratch.mkdir()
        self._serial = itertools.count(1)
        self._lines: list[str] = []
        self._cgroup = self._make_cgroup()
        root = image.build(CHECKOUT, directory / "image.log")
        command = enclosure.command(root, self._scratch, "python3", "-I", "-c", INIT, cgroup=bool(self._cgroup))
        self._process = subprocess.Popen(self._joining(command), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "up\n", "the bed does not come up: see above"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.pid = int(children[0])
        if self._cgroup:
            self.root("mount -t cgroup2 cgroup2 /sys/fs/cgroup && mkdir /sys/fs/cgroup/job")
            self._cgroup /= "job"
        self._listen()
        leaders = self._directory / "leaders"
        leaders.mkdir()
        (leaders / "bed.leader").write_text(str(self.pid))
        (self._directory / "hosts.yml").write_text(HOSTS % leaders)
        self.deploy("worker", "--skip-tags", "worker_timer")
        self.path("/srv/work").mkdir(mode=0o755)
        self._certify()

    # -- building

    @staticmethod
    def _make_cgroup() -> Path | None:
        own = policy.unified_cgroup(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
        if not own or not os.access(own, os.W_OK):
            return None
        for old in Path(own).glob("pilotbed-glexec-*"):  # of runs that were killed
            if not Path("/proc", old.name.rpartition("-")[2]).exists():
                (old / "cgroup.kill").write_text("1")
                until(f"{old} is empty", lambda old=old: "populated 0" in (old / "cgroup.events").read_text())
                remove_cgroup(old)
        made = Path(own) / f"pilotbed-glexec-{os.getpid()}"
        made.mkdir()
        return made

    def _joining(self, command: Sequence[str]) -> list[str]:
        if not self._cgroup:
            return list(command)
        return ["sh", "-c", 'echo 0 >"$1"; shift; exec "$@"', "sh", f"{self._cgroup}/cgroup.procs", *command]

    def _listen(self) -> None:
        self._log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._log.bind(str(self.path("/dev/log")))
        self.path("/dev/log").chmod(0o666)
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        while message := self._log.recv(65536):
            # <priority>Mmm dd hh:mm:ss tag[pid]: text
            self._lines.append(message.decode(errors="replace").partition(">")[2][16:].rstrip("\0\n"))

    def deploy(self, role: str, *options: str, **variables: object) -> None:
        """Have Ansible install a role; ``options`` are ansible-playbook's."""
        play = self._directory / "play.yml"
        play.write_text(PLAY % (json.dumps(variables), role))
        done = self.play(play, *options)
        assert done.returncode == 0, f"the role does not install:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"

    def play(self, playbook: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Run a playbook on the bed; ``options`` are ansible-playbook's."""
        environment = os.environ | {
            "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"), "ANSIBLE_CACHE_PLUGIN": "memory",
            "ANSIBLE_ROLES_PATH": str(CHECKOUT / "roles"), "ANSIBLE_STDOUT_CALLBACK": "default",
        }  # fmt: skip
        inventories = ["-i", str(CHECKOUT / "inventory/common"), "-i", str(self._directory / "hosts.yml")]
        return subprocess.run(
            [ansible("ansible-playbook"), *inventories, *options, str(playbook)],
            cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    def _certify(self) -> None:
        self.ca = pki.Authority(self.path(TRUST))
        server = self.ca.issue(VOMS, host="voms.grid.test")
        self.voms = pki.VomsServer(self.path("/etc/grid-security/vomsdir"), server)
        self.voms.publish()
        self.people = {name: self.ca.issue(PEOPLE + name.title()) for name in ("alice", "bob", "carol", "mallory")}

    def close(self) -> None:
        """End everything in the bed."""
        self._process.kill()
        self._process.wait()
        self._scratch.rmdir()
        if self._cgroup:
            whole = self._cgroup.parent
            until("the bed's cgroup is empty", lambda: "populated 0" in (whole / "cgroup.events").read_text())
            remove_cgroup(whole)

    # -- files

    def path(self, path: str) -> Path:
        """Return where a path of the bed is on this host; there must be no absolute link on the way."""
        return Path(f"/proc/{self.pid}/root{path}")

    def directory(self, owner: str = PILOT, mode: int = 0o711) -> str:
        """Return a new directory, open to all for passing through."""
        made = f"/srv/work/{next(self._serial)}"
        self.path(made).mkdir()
        self.path(made).chmod(mode)
        os.chown(self.path(made), *self.ids(owner))
        return made

    def write(self, path: str, content: str | bytes, owner: str = PILOT, mode: int = 0o600) -> str:
        """Write a file; return its path."""
        there = self.path(path)
        there.write_bytes(content.encode() if isinstance(content, str) else content)
        os.chown(there, *self.ids(owner))
        there.chmod(mode)
        return path

    def _accounts(self) -> list[list[str]]:
        return [line.split(":") for line in self.path("/etc/passwd").read_text().splitlines()]

    def ids(self, account: str) -> tuple[int, int]:
        """Return uid and primary gid of an account of the bed."""
        return next((int(fields[2]), int(fields[3])) for fields in self._accounts() if fields[0] == account)

    def name(self, uid: int) -> str:
        """Return the account of a uid in the bed."""
        return next((fields[0] for fields in self._accounts() if fields[2] == str(uid)), str(uid))

    def proxy(self, who: str = "alice", *, fqans: Sequence[str] = ("/gridlab",), hours: float = 12, **options) -> bytes:
        """Return a proxy with VOMS attributes (PEM, with its key)."""
        holder = self.people[who]
        options.setdefault("days", (-0.1, hours / 24))
        if not fqans:
            return pki.proxy(holder, **options).pem()
        written = [fqan if "/Role=" in fqan else f"{fqan}/Role=NULL" for fqan in fqans]
        attributes = self.voms.attribute_certificate(holder, *(f"{fqan}/Capability=NULL" for fqan in written))
        return pki.with_attributes(holder, attributes, **options).pem()

    @contextlib.contextmanager
    def changed(self, path: str, edit: Callable[[str], str]) -> Iterator[None]:
        """Change a file for a while, in place."""
        there = self.path(path)
        before, found = there.read_text(), there.stat()
        there.write_text(edit(before))
        try:
            yield
        finally:
            there.write_text(before)
            os.chown(there, found.st_uid, found.st_gid)
            there.chmod(found.st_mode & 0o7777)

    def configured(self, **keys: str) -> contextlib.AbstractContextManager[None]:
        """Set keys of glexec.conf for a while."""
        def edit(text: str) -> str:
            kept = [line for line in text.splitlines() if line.partition("=")[0].strip() not in keys]
            return "\n".join([*kept, *(f"{key} = {value}" for key, value in keys.items())]) + "\n"

        return self.changed(CONF, edit)

    def patched(self, module: str, old: str, new: str) -> contextlib.AbstractContextManager[None]:
        """Take a protection out of glexec for a while: a negative control. `old` must be there exactly once."""
        def edit(text: str) -> str:
            assert text.count(old) == 1, f"{module} has {old!r} {text.count(old)} times: this control has to follow it"
            return text.replace(old, new)

        return self.changed(f"{SOURCES}/{module}.py", edit)

    @contextlib.contextmanager
    def leased(self, account: str, dn: str) -> Iterator[None]:
        """Have an account leased to a DN for a while, as LCMAPS does it on the computing element."""
        name = "".join(c if c.isalnum() else f"%{ord(c):02x}" for c in dn.lower())
        self.root(f"cd {GRIDMAPDIR} && ln -f {account} {name}:glpilot")
        try:
            yield
        finally:
            self.root(f"rm {GRIDMAPDIR}/{name}:glpilot")

    # -- commands

    def command(self, *argv: str, user: str = PILOT, env: Mapping[str, str] | None = None,
                cgroups: str = "writable") -> list[str]:  # fmt: skip
        """Return the command, for this host, that runs `argv` in the bed."""
        uid, gid = self.ids(user)
        become = ["setpriv", "--reuid", str(uid), "--regid", str(gid), "--init-groups", "--"] if uid else []
        given = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "LANG": "C.UTF-8", **(env or {})}
        prepare = CGROUPS[cgroups]
        held = ["unshare", "--mount", "sh", "-ec", f'{prepare}; exec "$@"', "sh"] if prepare else []
        return self._joining([
            "nsenter", "--target", str(self.pid), "--all", "--", *held,
            *become, "env", "-i", *(f"{key}={value}" for key, value in given.items()), *argv,
        ])  # fmt: skip

    def start(self, *argv: str, **options) -> subprocess.Popen[str]:
        """Start a command in the bed; keywords of `command`."""
        return self.popen(self.command(*argv, **options))

    @staticmethod
    def popen(command: Sequence[str]) -> subprocess.Popen[str]:
        """Start what `command` has returned, or what has been made of that."""
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str], since: int = 0, input: str | None = None) -> Done:
        """Wait for a started command."""
        try:
            out, err = process.communicate(input, timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"no end in {DEADLINE} s: {out}{err}{self.log()[-5:]}") from None
        return Done(process.returncode, out, err, self.log()[since:])

    def run(self, *argv: str, input: str | None = None, **options) -> Done:
        """Run a command in the bed; keywords of `command`."""
        since = len(self.log())
        return self.finish(self.start(*argv, **options), since, input)

    def root(self, script: str) -> str:
        """Run a shell script as root that must succeed; return what it printed."""
        command = self.command("sh", "-euc", script, user="root")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout

    def log(self) -> list[str]:
        """Return all lines that the node's log has got."""
        if hasattr(self, "_log"):
            mark = f"mark {next(self._serial)}"
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(f"<0>{'':15} {mark}".encode(), str(self.path("/dev/log")))
            until("the log is read", lambda: mark in self._lines)
            self._lines.remove(mark)
        return list(self._lines)

    # -- what is there

    def processes(self) -> dict[int, tuple[str, str]]:
        """Return {pid in the bed: (account, command line)} of the bed's processes."""
        listed = (line.split(None, 2) for line in self.root("ps -ww -eo pid=,uid=,args=").splitlines())
        return {int(fields[0]): (self.name(int(fields[1])), fields[2]) for fields in listed}

    def left(self) -> list[str]:
        """Return what payloads have left on the node: processes, files, System V objects, cgroups, glexec's own."""
        found = [
            f"process {pid} {account} {args}" for pid, (account, args) in self.processes().items()
            if account.startswith("gl") or "glexec" in args
        ]  # fmt: skip
        first, last = POOL
        pool = f"-uid +{first - 1} -uid -{last + 1}"
        found += self.root(f"find /tmp /var/tmp /dev/shm /srv/work -xdev {pool} -printf '%p %u\\n'").splitlines()
        for kind in ("shm", "sem", "msg"):
            lines = [line.split() for line in self.root(f"cat /proc/sysvipc/{kind}").splitlines()]
            at = lines[0].index("uid")
            owners = {line[1]: int(line[at]) for line in lines[1:]}
            found += [f"{kind} {key} of {self.name(uid)}" for key, uid in owners.items() if first <= uid <= last]
        if self._cgroup:
            found += [str(path) for path in self._cgroup.rglob("*/")]
        return found

    def clear(self) -> None:
        """Remove what a payload has left; for negative controls, and before a test that must not find it."""
        for pid, (account, args) in self.processes().items():
            if pid != 1 and (account.startswith("gl") or "glexec" in args):
                self.root(f"kill -9 {pid} 2>/dev/null || true")
        self.root("find /tmp /var/tmp /dev/shm /srv/work -mindepth 1 -maxdepth 1 -exec rm -rf {} +")
        self.root("ipcrm --all 2>/dev/null || true")
        self.root(f"cd {GRIDMAPDIR} && find . -name '%*' -delete")
        if self._cgroup:
            for below in self._cgroup.glob("*/"):
                until(f"{below} is empty", lambda below=below: "populated 0" in (below / "cgroup.events").read_text())
                remove_cgroup(below)
        self.root("ls /run/glexec 2>/dev/null | grep -q -- - && /usr/libexec/pilotbed/glexec-clean || true")


@contextlib.contextmanager
def journald(bed: Bed) -> Iterator[subprocess.Popen[str]]:
    """Have systemd-journald in the bed for a while; glexec then writes to it and not to /dev/log."""
    bed.root("mkdir -p /run/systemd/journal /run/log/journal /etc/systemd/journald.conf.d")
    bed.write("/etc/systemd/journald.conf.d/bed.conf", "[Journal]\nAudit=\nReadKMsg=no\nRateLimitBurst=0\n", "root")
    process = bed.start("/usr/lib/systemd/systemd-journald", user="root")
    until("journald listens", bed.path("/run/systemd/journal/socket").exists)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        bed.root("pkill -x systemd-journal || true; rm -rf /run/systemd/journal /run/log/journal")


def remove_cgroup(path: Path) -> None:
    """Remove a cgroup and those below it. Raises OSError while there are processes."""
    for below in sorted(path.rglob("*/"), key=lambda below: len(below.parts), reverse=True):
        below.rmdir()
    path.rmdir()
