"""Local nodes: systemd-nspawn machines over one image, in networks of their own.

What there is on the host while a lab lives, so that all of it can be found and cleared, whoever made it:

* ``/var/lib/pilotbed/lab``: ``lab.json`` (whose lab it is), and a layered directory for each node and site;
* ``/run/pilotbed/nodes``: one ``NODE.leader`` with the PID of each node's init;
* network namespaces ``pilotbed`` (all bridges) and ``pilotbed-NODE``: nothing of the host's own network changes;
* cgroups ``pilotbed/NODE``, or units ``pilotbed-NODE.service`` where the host runs systemd.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import LabError
from .topology import Node, Topology

STATE = Path("/var/lib/pilotbed/lab")
SNAPSHOTS = STATE / "snapshots"
RUN = Path("/run/pilotbed/nodes")
SWITCH = "pilotbed"
NSPAWN = Path("/run/systemd/nspawn")
CGROUPS = Path("/sys/fs/cgroup")
#: Seconds that a node may take to boot, and to stop before it is killed.
BOOT_TIMEOUT = 60
STOP_TIMEOUT = 10

#: Systemd, D-Bus and a login prompt take seven inotify instances a node; with the kernel's 128 the 18th fails with
#: "Failed to create inotify object: Too many open files".
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_WANTED = 1024


def _ip(*lines: str, namespace: str | None = None) -> None:
    """Run lines of iproute2 in one process."""
    where = ["-n", namespace] if namespace else []
    done = subprocess.run(
        ["ip", *where, "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabError(f"network set-up failed: {done.stderr.strip()}")


def _netns(node: str) -> str:
    return f"{SWITCH}-{node}"


def _bridge(network: str) -> str:
    return f"br-{network}"[:15]


def boot_id() -> str:
    """Return the identity of the host's current boot: what an earlier one left behind is dead."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Layers:
    """A directory made of read-only layers and one writable one on top, so that a snapshot copies nothing.

    Args:
        path: directory that holds ``upper``, ``work``, ``root`` (the mount) and ``layers`` (a list of paths).
    """

    def __init__(self, path: Path):
        self.path = path
        self.root = path / "root"

    def mount(self, base: Path) -> None:
        """Mount the directory at ``root``; ``base`` is the lowest layer of a new one."""
        for name in ("upper", "work", "root"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        layers = self.path / "layers"
        if not layers.exists():
            layers.write_text(f"{base}\n")
        lower = ":".join(reversed(layers.read_text().split()))
        options = f"lowerdir={lower},upperdir={self.path}/upper,workdir={self.path}/work"
        done = subprocess.run(
            ["mount", "-t", "overlay", "pilotbed", "-o", options, str(self.root)],
            capture_output=True, text=True, check=False,
        )
        if done.returncode:
            raise LabError(f"cannot mount {self.root}: {done.stderr.strip()}")

    def freeze(self, snapshot: Path) -> None:
        """Make what was written since the last snapshot a read-only layer in ``snapshot``. Not mounted meanwhile."""
        snapshot.mkdir(parents=True)
        frozen = snapshot / "layer"
        (self.path / "upper").rename(frozen)
        layers = self.path / "layers"
        layers.write_text(layers.read_text() + f"{frozen}\n")
        shutil.copy(layers, snapshot / "layers")
        shutil.rmtree(self.path / "work")

    def thaw(self, snapshot: Path) -> None:
        """Return to ``snapshot``: what was written since is dropped. Not mounted meanwhile."""
        for name in ("upper", "work"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.copy(snapshot / "layers", self.path / "layers")


def leader(name: str) -> int | None:
    """Return the PID, on the host, of the init of node ``name``, or None if the node does not run."""
    try:
        pid = int((RUN / f"{name}.leader").read_text())
        # PIDs come again: only a process that lives in the node's network namespace is its init.
        if Path(f"/proc/{pid}/ns/net").stat().st_ino == Path(f"/run/netns/{_netns(name)}").stat().st_ino:
            return pid
    except (OSError, ValueError):
        pass
    return None


def running() -> list[str]:
    """Return the names of the nodes that run."""
    return sorted(path.stem for path in RUN.glob("*.leader") if leader(path.stem))


def enter(name: str, *argv: str) -> list[str]:
    """Return the command that runs ``argv`` as root inside node ``name``.

    Raises:
        LabError: the node does not run.
    """
    pid = leader(name)
    if pid is None:
        raise LabError(f"node {name} does not run: `make lab` boots it")
    return [
        "nsenter", "--target", str(pid), "--all", "--", "/usr/bin/env", "-i", "HOME=/root", "USER=root",
        "LANG=C.UTF-8", f"TERM={os.environ.get('TERM', 'dumb')}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *argv,
    ]


def hierarchies() -> list[Path]:
    """Return the mounted cgroup hierarchies: one on a pure v2 host, many on a hybrid one."""
    if (CGROUPS / "cgroup.procs").exists():
        return [CGROUPS]
    return [path for path in CGROUPS.iterdir() if not path.is_symlink() and (path / "cgroup.procs").exists()]


def _make_cgroups(name: str) -> list[Path]:
    """Make and return the cgroups of a node: with one tree for all, each systemd would believe that it owns it."""
    made = []
    for hierarchy in hierarchies():
        path = hierarchy / SWITCH / name
        path.mkdir(parents=True, exist_ok=True)
        if (hierarchy / "cpuset.cpus").exists():
            for parent, child in ((hierarchy, path.parent), (path.parent, path)):
                for knob in ("cpuset.cpus", "cpuset.mems"):
                    (child / knob).write_text((parent / knob).read_text())
        elif hierarchy == CGROUPS:
            controllers = (hierarchy / "cgroup.controllers").read_text().split()
            for parent in (hierarchy, path.parent):
                with contextlib.suppress(OSError):
                    (parent / "cgroup.subtree_control").write_text(" ".join(f"+{x}" for x in controllers))
        made.append(path)
    return made


def _remove_cgroups(name: str = "") -> None:
    """Kill what is left in a node's cgroups (of all nodes, without a name) and remove them."""
    tops = [hierarchy / SWITCH / name for hierarchy in hierarchies()]
    for _ in range(50):
        left = False
        for top in tops:
            if not top.is_dir():
                continue
            if (top / "cgroup.kill").exists() and _populated(top):
                (top / "cgroup.kill").write_text("1")
            for directory, _names, _files in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    for pid in Path(directory, "cgroup.procs").read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
            left = left or top.is_dir()
        if not left:
            return
        time.sleep(0.1)


def _populated(cgroup: Path) -> bool:
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except OSError:
        return False


def _host_runs_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


class Lab:
    """The local nodes of one checkout.

    Args:
        checkout: the project's directory.
        topology: what to stand up.
        image: the nodes' root file system; None where no node is booted.
        say: takes one line of progress.
    """

    def __init__(self, checkout: Path, topology: Topology, image: Path | None, say: Callable[[str], None]):
        self.checkout = checkout
        self.topology = topology
        self.image = image
        self.say = say

    # -- the whole lab -------------------------------------------------------------------------------------------

    def up(self) -> list[str]:
        """Boot every node that does not run; return their names.

        Raises:
            LabError: the lab of another checkout is alive; a node does not boot.
        """
        self.claim()
        self._networks()
        missing = [node for node in self.topology.nodes if leader(node.name) is None]
        if not missing:
            return []
        for site in self.topology.sites:
            layers = Layers(STATE / "sites" / site)
            if not layers.root.is_mount():
                empty = STATE / "empty"
                empty.mkdir(exist_ok=True)
                layers.mount(empty)
        key = _ssh_key()
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda node: self._boot(node, key), missing))
        self._ssh_configuration()
        return [node.name for node in missing]

    def _ssh_configuration(self) -> None:
        """Write an ssh configuration by which the host reaches every node, whatever filters stand between."""
        known, config = [], []
        for node in self.topology.nodes:
            known.append(f"{node.name} {(STATE / 'nodes' / node.name / 'hostkey.pub').read_text()}")
            config.append(
                f"Host {node.name}\n"
                f"    ProxyCommand nsenter --net=/run/netns/{_netns(node.name)} nc 127.0.0.1 22\n"
            )
        (STATE / "ssh" / "known_hosts").write_text("".join(known))
        config.append(
            f"Host *\n    User root\n    IdentityFile {STATE}/ssh/id_ed25519\n    IdentitiesOnly yes\n"
            f"    UserKnownHostsFile {STATE}/ssh/known_hosts\n    StrictHostKeyChecking yes\n"
        )
        (STATE / "ssh" / "config").write_text("".join(config))

    def claim(self) -> None:
        """Make this checkout the owner of the host's lab; clear what a dead one left.

        Raises:
            LabError: the lab of another checkout is alive.
        """
        owner = read_owner()
        if owner is not None:
            alive = owner["boot_id"] == boot_id() and any(leader(name) for name in owner["nodes"])
            if owner["checkout"] != str(self.checkout):
                if alive and Path(owner["checkout"]).is_dir():
                    raise LabError(
                        f"a lab of another checkout is alive: {owner['checkout']}. "
                        f"Remove it first: make -C {owner['checkout']} destroy"
                    )
                self.say(f"clearing what the dead lab of {owner['checkout']} left behind")
                clear()
            elif owner["boot_id"] != boot_id():
                self.say("the host was rebooted: the nodes boot again from what is on disk")
                _clear_running()
        elif leftovers():
            self.say("clearing what a dead lab left behind")
            clear()
        STATE.mkdir(parents=True, exist_ok=True)
        RUN.mkdir(parents=True, exist_ok=True)
        record = {
            "checkout": str(self.checkout), "boot_id": boot_id(), "nodes": [node.name for node in self.topology.nodes]
        }
        partial = STATE / "lab.json.partial"
        partial.write_text(json.dumps(record))
        partial.rename(STATE / "lab.json")
        if int(INOTIFY.read_text()) < INOTIFY_WANTED:
            INOTIFY.write_text(str(INOTIFY_WANTED))
            self.say(f"raised fs.inotify.max_user_instances to {INOTIFY_WANTED} (until the next boot)")

    def stop(self, kill: bool = False) -> None:
        """Stop every node; with ``kill`` without asking."""
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda node: _stop(node.name, kill), self.topology.nodes))
        for site in self.topology.sites:
            _unmount(STATE / "sites" / site / "root")

    def snapshot(self, name: str) -> None:
        """Keep every node as it is now under ``name``; the nodes stop for it and boot again.

        Raises:
            LabError: the name is taken or no name for a directory; no lab is there.
        """
        directory = self._snapshot_path(name)
        if directory.exists():
            raise LabError(f"there is a snapshot {name!r} already: take another name")
        self._must_exist()
        self.stop()
        for layers in self._layers():
            layers.freeze(directory / layers.path.relative_to(STATE))
        self.up()

    def restore(self, name: str) -> None:
        """Bring every node back to snapshot ``name``.

        Raises:
            LabError: there is no such snapshot.
        """
        directory = self._snapshot_path(name)
        if not directory.is_dir():
            known = ", ".join(sorted(path.name for path in SNAPSHOTS.glob("*"))) or "none"
            raise LabError(f"there is no snapshot {name!r}; there is: {known}")
        self._must_exist()
        self.stop(kill=True)
        for layers in self._layers():
            layers.thaw(directory / layers.path.relative_to(STATE))
        self.up()

    def _layers(self) -> Iterable[Layers]:
        for node in self.topology.nodes:
            yield Layers(STATE / "nodes" / node.name)
        for site in self.topology.sites:
            yield Layers(STATE / "sites" / site)

    def _snapshot_path(self, name: str) -> Path:
        if not name or "/" in name or name.startswith("."):
            raise LabError(f"{name!r} is no name for a snapshot: make snapshot NAME=before-the-lesson")
        return SNAPSHOTS / name

    def _must_exist(self) -> None:
        owner = read_owner()
        if owner is None or owner["checkout"] != str(self.checkout):
            raise LabError("this checkout has no lab: `make lab` makes one")

    # -- networks ------------------------------------------------------------------------------------------------

    def _networks(self) -> None:
        if not Path("/run/netns", SWITCH).exists():
            _ip(f"netns add {SWITCH}")
            _ip("link set lo up", namespace=SWITCH)
        have = _links(SWITCH)
        for network in self.topology.networks:
            bridge = _bridge(network.name)
            if bridge not in have:
                _ip(f"link add {bridge} type bridge", f"link set {bridge} up", namespace=SWITCH)

    def _plug(self, node: Node) -> None:
        """Make the node's network namespace, its interfaces and routes."""
        namespace = _netns(node.name)
        _ip(f"netns add {namespace}")
        lines = ["link set lo up"]
        for index, (network, address) in enumerate(node.addresses):
            outer = "v" + hashlib.sha256(f"{node.name}/{index}".encode()).hexdigest()[:10]
            _ip(f"link add {outer} type veth peer name eth{index} netns {namespace}",
                f"link set {outer} master {_bridge(network)} up", namespace=SWITCH)
            length = next(n.cidr.prefixlen for n in self.topology.networks if n.name == network)
            lines += [f"address add {address}/{length} dev eth{index}", f"link set eth{index} up"]
        lines += [f"route add {to} via {via}" for to, via in node.routes]
        _ip(*lines, namespace=namespace)

    # -- a node --------------------------------------------------------------------------------------------------

    def _boot(self, node: Node, key: str) -> None:
        started = time.monotonic()
        _stop(node.name, kill=True)  # whatever a dead one left
        directory = STATE / "nodes" / node.name
        layers = Layers(directory)
        assert self.image is not None
        layers.mount(self.image)
        self._plug(node)
        self._identity(node, directory, key)
        command = [
            "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", f"--directory={layers.root}",
            f"--machine={node.name}", f"--network-namespace-path=/run/netns/{_netns(node.name)}",
            "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--notify-ready=yes",
            "--capability=CAP_NET_ADMIN,CAP_SYS_ADMIN", "--system-call-filter=@keyring bpf", "--boot",
        ]
        if node.site:
            command[-1:-1] = [f"--bind={STATE}/sites/{node.site}/root:/srv/site"]
        # Writable /proc/sys/net, of the node's own network namespace only: routers forward.
        environment = {**os.environ, "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}
        console = directory / "console.log"
        if _host_runs_systemd():
            pid = _start_unit(node.name, command, console)
        else:
            pid = _start_process(node.name, command, console, environment)
        (RUN / f"{node.name}.leader").write_text(str(pid))
        self.say(f"  {node.name} boots in {time.monotonic() - started:.1f} s")

    def _identity(self, node: Node, directory: Path, key: str) -> None:
        """Write what makes the node itself: its name, machine id, ssh host key, and who may enter."""
        root = directory / "root"
        hostkey = directory / "hostkey"
        if hostkey.exists():
            return
        full = f"{node.name}.{self.topology.domain}"
        (root / "etc/hostname").write_text(f"{full}\n")
        (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {full} {node.name}\n")
        (root / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")
        partial = directory / "hostkey.partial"
        partial.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", node.name, "-f", str(partial)], check=True)
        shutil.copy(partial, root / "etc/ssh/ssh_host_ed25519_key")
        (directory / "hostkey.pub").write_text(Path(f"{partial}.pub").read_text())
        Path(f"{partial}.pub").unlink()
        ssh = root / "root/.ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        (ssh / "authorized_keys").write_text(key)
        partial.rename(hostkey)



def _links(namespace: str) -> set[str]:
    """Return the names of the interfaces in a network namespace."""
    shown = subprocess.run(["ip", "-n", namespace, "-j", "link"], capture_output=True, text=True, check=True).stdout
    return {link["ifname"] for link in json.loads(shown or "[]")}


def _start_process(name: str, command: list[str], console: Path, environment: dict[str, str]) -> int:
    """Start a node below this host's init and return the PID of its own; it says itself when it is ready."""
    cgroups = _make_cgroups(name)
    notify = RUN / f"{name}.notify"
    notify.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(notify))
        listener.settimeout(0.5)
        join = "".join(f"echo $$ > {cgroup}/cgroup.procs\n" for cgroup in cgroups)
        with open(console, "w") as out:
            process = subprocess.Popen(
                ["/bin/sh", "-c", join + 'exec "$@"', "sh", *command], stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True, cwd="/",
                env={**environment, "NOTIFY_SOCKET": str(notify)},
            )
        (RUN / f"{name}.nspawn").write_text(str(process.pid))
        pid = 0
        deadline = time.monotonic() + BOOT_TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            try:
                message = listener.recv(4096).decode()
            except TimeoutError:
                continue
            fields = dict(line.split("=", 1) for line in message.splitlines() if "=" in line)
            pid = int(fields.get("X_NSPAWN_LEADER_PID", pid))
            if fields.get("READY") == "1":
                notify.unlink()
                return pid or _child(process.pid)
    raise _boot_failure(name, console)


def _start_unit(name: str, command: list[str], console: Path) -> int:
    """Start a node as a transient unit of the host's systemd and return the PID of its init."""
    unit = f"{SWITCH}-{name}.service"
    properties = (
        "Type=notify", "NotifyAccess=all", "Delegate=yes", "KillMode=mixed", f"TimeoutStartSec={BOOT_TIMEOUT}",
    )
    done = subprocess.run(
        ["systemd-run", "--quiet", "--collect", f"--unit={unit}", "--slice=machine.slice",
         "--setenv=SYSTEMD_NSPAWN_API_VFS_WRITABLE=network", f"--property=StandardOutput=truncate:{console}",
         *(f"--property={value}" for value in properties), *command],
        capture_output=True, text=True, check=False,
    )
    if done.returncode:
        raise _boot_failure(name, console)
    shown = subprocess.run(
        ["systemctl", "show", "--property=MainPID", "--value", unit], capture_output=True, text=True, check=True
    )
    return _child(int(shown.stdout))


def _child(pid: int) -> int:
    """Return the node's init: the one child of its nspawn."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _boot_failure(name: str, console: Path) -> LabError:
    tail = "\n".join(console.read_text(errors="replace").splitlines()[-12:])
    return LabError(f"node {name} did not boot within {BOOT_TIMEOUT} s; its console ends with:\n{tail}")


def _stop(name: str, kill: bool) -> None:
    """Stop a node and take away everything but its layers. Does nothing where there is nothing."""
    pid = leader(name)
    if pid is not None and not kill:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGRTMIN + 4)  # systemd's request to power off
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
            time.sleep(0.05)
    if _host_runs_systemd():
        subprocess.run(["systemctl", "kill", "--quiet", "--signal=KILL", f"{SWITCH}-{name}.service"],
                       capture_output=True, check=False)
        subprocess.run(["systemctl", "stop", "--quiet", f"{SWITCH}-{name}.service"], capture_output=True, check=False)
    else:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # nspawn ends by itself when its init is gone
        _remove_cgroups(name)
    _unmount(STATE / "nodes" / name / "root")
    # Killed, nspawn of Debian 13 leaves it mounted, and the next one says "exists already, refusing".
    _unmount(NSPAWN / name / "unix-export")
    shutil.rmtree(NSPAWN / name, ignore_errors=True)
    if Path("/run/netns", _netns(name)).exists():
        # Interfaces live until the last process of the namespace is gone: delete them by name, from inside.
        with contextlib.suppress(LabError, subprocess.CalledProcessError):
            ours = sorted(link for link in _links(_netns(name)) if link.startswith("eth"))
            if ours:
                _ip(*(f"link del {link}" for link in ours), namespace=_netns(name))
        with contextlib.suppress(LabError):
            _ip(f"netns del {_netns(name)}")
    for path in RUN.glob(f"{name}.*"):
        path.unlink()


def _unmount(path: Path) -> None:
    if path.is_dir() and path.is_mount():
        subprocess.run(["umount", "--recursive", "--lazy", str(path)], check=False)


def _ssh_key() -> str:
    """Return the public part of the lab's ssh key, making the pair first: it opens these nodes and nothing else."""
    directory = STATE / "ssh"
    directory.mkdir(mode=0o700, exist_ok=True)
    key = directory / "id_ed25519"
    if not key.with_suffix(".pub").exists():
        key.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "pilotbed", "-f", str(key)], check=True)
    return key.with_suffix(".pub").read_text()


# -- whose lab, and what is left of it -----------------------------------------------------------------------------


def read_owner() -> dict[str, Any] | None:
    """Return the record of the host's lab (``checkout``, ``boot_id``, ``nodes``), or None."""
    try:
        record = json.loads((STATE / "lab.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"checkout", "boot_id", "nodes"} <= set(record) else None


def leftovers() -> list[str]:
    """Return what of any lab is on the host: directories, mounts, namespaces, cgroups, units. For people to read."""
    found = [str(path) for path in (STATE, RUN) if path.exists()]
    with open("/proc/self/mounts") as mounts:
        found += [f"mount {line.split()[1]}" for line in mounts if line.split()[1].startswith(f"{STATE}/")]
    netns = Path("/run/netns")
    if netns.is_dir():
        names = [path.name for path in netns.iterdir()]
        found += [f"network namespace {name}" for name in names if f"{name}-".startswith(f"{SWITCH}-")]
    found += [f"cgroup {h / SWITCH}" for h in hierarchies() if (h / SWITCH).exists()]
    return found


def clear() -> None:
    """Remove every trace of any lab from the host, alive or dead, whoever made it. The images stay."""
    _clear_running()
    for _ in range(50):
        # Never down into what is still mounted.
        subprocess.run(["rm", "-rf", "--one-file-system", str(STATE), str(RUN)], capture_output=True, check=False)
        if not STATE.exists():
            break
        time.sleep(0.1)
    if left := leftovers():
        raise LabError(f"this is left of the lab and cannot be removed: {'; '.join(left)}")


def _clear_running() -> None:
    """Remove what runs and is mounted; keep what is on disk."""
    netns = Path("/run/netns")
    names = {path.name.removeprefix(f"{SWITCH}-") for path in netns.glob(f"{SWITCH}-*")} if netns.is_dir() else set()
    nodes = STATE / "nodes"
    names |= {path.name for path in nodes.iterdir()} if nodes.is_dir() else set()
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(lambda name: _stop(name, kill=True), names))
    _remove_cgroups()
    with open("/proc/self/mounts") as mounts:
        left = [line.split()[1] for line in mounts if line.split()[1].startswith(f"{STATE}/")]
    for path in reversed(left):
        subprocess.run(["umount", "--lazy", path], check=False)
    if (netns / SWITCH).exists():
        _ip(f"netns del {SWITCH}")
