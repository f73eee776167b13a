"""Local nodes: systemd-nspawn machines over one image, in networks of their own.

A lab belongs to a checkout and has a name there, so that any number of them live on one host, beside each other. Its
key is ``NAME-HASH``, the hash being that of the checkout's path. What there is of a lab on the host, so that all of it
can be found and cleared:

* ``/var/lib/pilotbed/labs/KEY``: ``lab.json`` (whose lab it is), ``leaders`` (the PID of each node's init), and a
  layered directory for each node and site; ``var/labs/NAME`` of the checkout leads there;
* network namespaces ``pilotbed-KEY`` (all bridges) and ``pilotbed-KEY-NODE``;
* cgroups ``pilotbed/KEY/NODE``, or units ``pilotbed-KEY-NODE.service`` where the host runs systemd.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pilotbed_suite import DEFAULT_LAB, local

from . import LabError, cgroups
from .layers import Layers, mounts_below, unmount
from .network import Switch
from .topology import Node, Topology

LABS = Path("/var/lib/pilotbed/labs")
NSPAWN = Path("/run/systemd/nspawn")
#: Of a lab. Without a hyphen, so that no lab's names begin like another's; short enough for a machine's name.
NAME = re.compile(r"[a-z][a-z0-9]{0,11}")
#: Seconds that a node may take to boot, and to stop before it is killed.
BOOT_TIMEOUT = 60
STOP_TIMEOUT = 10

#: Systemd, D-Bus and a login prompt take seven inotify instances a node; with the kernel's 128 the 18th fails with
#: "Failed to create inotify object: Too many open files".
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_WANTED = 4096


def boot_id() -> str:
    """Return the identity of the host's current boot: what an earlier one left behind is dead."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _host_runs_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


class Remains:
    """What there is of a lab on the host, alive or dead; known by its key alone.

    Args:
        key: ``NAME-HASH``.
    """

    def __init__(self, key: str):
        self.key = key
        self.state = LABS / key
        self.switch = Switch(f"{local.PREFIX}-{key}")

    def record(self) -> dict[str, Any] | None:
        """Return whose lab it is (``name``, ``checkout``, ``boot_id``, ``nodes``), or None where nothing says so."""
        try:
            record = json.loads((self.state / "lab.json").read_text())
        except (OSError, ValueError):
            return None
        wanted = {"name", "checkout", "boot_id", "nodes"}
        return record if isinstance(record, dict) and wanted <= set(record) else None

    def running(self) -> list[str]:
        """Return the names of the nodes that run."""
        return local.running(self.state)

    def left(self) -> list[str]:
        """Return what there is: directory, mounts, namespaces, cgroups. For people to read."""
        found = [str(self.state)] if self.state.exists() else []
        found += [f"mount {path}" for path in mounts_below(self.state)]
        found += [f"network namespace {name}" for name in self.switch.left()]
        return found + [f"cgroup {path}" for path in cgroups.left(self.key)]

    def clear(self) -> None:
        """Remove every trace of the lab, alive or dead. The images stay.

        Raises:
            LabError: something cannot be removed.
        """
        record = self.record()
        self.clear_running()
        for _ in range(50):
            # Never down into what is still mounted.
            subprocess.run(["rm", "-rf", "--one-file-system", str(self.state)], capture_output=True, check=False)
            if not self.state.exists():
                break
            time.sleep(0.1)
        if record:
            with contextlib.suppress(OSError):  # the checkout may be gone
                Path(record["checkout"], "var/labs", record["name"]).unlink()
        if left := self.left():
            raise LabError(f"this is left of the lab and cannot be removed: {'; '.join(left)}")

    def clear_running(self) -> None:
        """Remove what runs and is mounted; keep what is on disk."""
        directory = self.state / "nodes"
        names = self.switch.nodes() | ({path.name for path in directory.iterdir()} if directory.is_dir() else set())
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda name: self.stop_node(name, kill=True), names))
        cgroups.remove(self.key)
        for path in reversed(mounts_below(self.state)):
            subprocess.run(["umount", "--lazy", path], check=False)
        self.switch.remove()

    def unit(self, node: str) -> str:
        """Return the unit of a node on a host that runs systemd."""
        return f"{self.switch.namespace(node)}.service"

    def machine(self, node: str) -> str:
        """Return what nspawn calls a node; no two on a host have the same name."""
        return f"{self.key}-{node}"

    def stop_node(self, name: str, kill: bool) -> None:
        """Stop a node and take away everything but its layers. Does nothing where there is nothing.

        Args:
            name: the node's.
            kill: without asking it first.
        """
        pid = local.leader(name, self.state)
        if pid is not None and not kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGRTMIN + 4)  # systemd's request to power off
            deadline = time.monotonic() + STOP_TIMEOUT
            while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
                time.sleep(0.05)
        if _host_runs_systemd():
            for words in (["kill", "--signal=KILL"], ["stop"]):
                subprocess.run(["systemctl", *words, "--quiet", self.unit(name)], capture_output=True, check=False)
        else:
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # nspawn ends by itself when its init is gone
            cgroups.remove(f"{self.key}/{name}")
        unmount(self.state / "nodes" / name / "root")
        # Killed, nspawn of Debian 13 leaves it mounted, and the next one says "exists already, refusing".
        # Its directories go by the machine's name.
        unmount(NSPAWN / self.machine(name) / "unix-export")
        shutil.rmtree(NSPAWN / self.machine(name), ignore_errors=True)
        self.switch.unplug(name)
        for path in (self.state / "leaders").glob(f"{name}.*"):
            path.unlink()


def all_labs() -> list[Remains]:
    """Return the labs of all checkouts of this host."""
    return [Remains(path.name) for path in sorted(LABS.iterdir()) if path.is_dir()] if LABS.is_dir() else []


class Lab(Remains):
    """The local nodes of one checkout, under one name.

    Args:
        checkout: the project's directory.
        topology: what to stand up; None for a lab that is only looked at or removed.
        image: the nodes' root file system; None where no node is booted.
        say: takes one line of progress.
        name: of the lab.

    Raises:
        LabError: no lab can have this name.
    """

    def __init__(
        self, checkout: Path, topology: Topology | None = None, image: Path | None = None,
        say: Callable[[str], None] = print, name: str = DEFAULT_LAB,
    ):  # fmt: skip
        if not NAME.fullmatch(name):
            raise LabError(f"{name!r} is no name for a lab: up to 12 lower case letters and digits, such as LAB=lesson")
        super().__init__(f"{name}-{hashlib.sha256(str(checkout).encode()).hexdigest()[:6]}")
        self.name = name
        self.checkout = checkout
        self.image = image
        self.say = say
        self._topology = topology

    @property
    def topology(self) -> Topology:
        """What to stand up."""
        assert self._topology is not None
        return self._topology

    # -- the whole lab -------------------------------------------------------------------------------------------

    def stands(self) -> bool:
        """Return whether every node runs, so that there is nothing to boot."""
        owner = self.record()
        alive = owner is not None and owner["boot_id"] == boot_id()
        return alive and all(local.leader(node.name, self.state) is not None for node in self.topology.nodes)

    def up(self) -> list[str]:
        """Boot every node that does not run; return their names.

        Raises:
            LabError: a node does not boot.
        """
        self.claim()
        self.switch.make(self.topology)
        missing = [node for node in self.topology.nodes if local.leader(node.name, self.state) is None]
        if not missing:
            return []
        for site in self.topology.sites:
            layers = Layers(self.state / "sites" / site)
            if not layers.root.is_mount():
                empty = self.state / "empty"
                empty.mkdir(exist_ok=True)
                layers.mount(empty)
        key = self._ssh_key()
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda node: self._boot(node, key), missing))
        self._ssh_configuration()
        return [node.name for node in missing]

    def claim(self) -> None:
        """Make the lab's directory; clear what a dead one left, and the labs of checkouts that are gone."""
        LABS.mkdir(parents=True, exist_ok=True)
        with _locked():
            for other in all_labs():
                record = other.record()
                if record and not Path(record["checkout"]).is_dir():
                    self.say(f"clearing the lab {record['name']} of {record['checkout']}, which is gone")
                    other.clear()
            owner = self.record()
            if owner is None and self.left():
                self.say("clearing what a dead lab left behind")
                self.clear()
            elif owner is not None and owner["boot_id"] != boot_id():
                self.say("the host was rebooted: the nodes boot again from what is on disk")
                self.clear_running()
            (self.state / "leaders").mkdir(parents=True, exist_ok=True)
            self._write_record()
            if int(INOTIFY.read_text()) < INOTIFY_WANTED:
                INOTIFY.write_text(str(INOTIFY_WANTED))
                self.say(f"raised fs.inotify.max_user_instances to {INOTIFY_WANTED} (until the next boot)")

    def _write_record(self) -> None:
        record = {
            "name": self.name, "checkout": str(self.checkout), "boot_id": boot_id(),
            "nodes": [node.name for node in self.topology.nodes],
        }  # fmt: skip
        partial = self.state / "lab.json.partial"
        partial.write_text(json.dumps(record))
        partial.rename(self.state / "lab.json")
        way = self.checkout / "var/labs" / self.name
        if not way.is_symlink() or way.readlink() != self.state:
            way.parent.mkdir(parents=True, exist_ok=True)
            way.unlink(missing_ok=True)
            way.symlink_to(self.state)

    def stop(self, kill: bool = False) -> None:
        """Stop every node; with ``kill`` without asking."""
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda node: self.stop_node(node.name, kill), self.topology.nodes))
        for site in self.topology.sites:
            unmount(self.state / "sites" / site / "root")

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
            layers.freeze(directory / layers.path.relative_to(self.state))
        self.up()

    def restore(self, name: str) -> None:
        """Bring every node back to snapshot ``name``.

        Raises:
            LabError: there is no such snapshot.
        """
        directory = self._snapshot_path(name)
        if not directory.is_dir():
            known = ", ".join(sorted(path.name for path in (self.state / "snapshots").glob("*"))) or "none"
            raise LabError(f"there is no snapshot {name!r}; there is: {known}")
        self._must_exist()
        self.stop(kill=True)
        for layers in self._layers():
            layers.thaw(directory / layers.path.relative_to(self.state))
        self.up()

    def _layers(self) -> Iterable[Layers]:
        for node in self.topology.nodes:
            yield Layers(self.state / "nodes" / node.name)
        for site in self.topology.sites:
            yield Layers(self.state / "sites" / site)

    def _snapshot_path(self, name: str) -> Path:
        if not name or "/" in name or name.startswith("."):
            raise LabError(f"{name!r} is no name for a snapshot: make snapshot NAME=before-the-lesson")
        return self.state / "snapshots" / name

    def _must_exist(self) -> None:
        if self.record() is None:
            raise LabError(f"this checkout has no lab {self.name!r}: `make lab` makes one")

    # -- ssh -----------------------------------------------------------------------------------------------------

    def _ssh_key(self) -> str:
        """Return the public part of the lab's ssh key, made first: it opens these nodes and nothing else."""
        directory = self.state / "ssh"
        directory.mkdir(mode=0o700, exist_ok=True)
        key = directory / "id_ed25519"
        if not key.with_suffix(".pub").exists():
            key.unlink(missing_ok=True)
            _make_key(key, "pilotbed")
        return key.with_suffix(".pub").read_text()

    def _ssh_configuration(self) -> None:
        """Write an ssh configuration by which the host reaches every node, whatever filters stand between."""
        known, config = [], []
        ssh = self.state / "ssh"
        for node in self.topology.nodes:
            known.append(f"{node.name} {(self.state / 'nodes' / node.name / 'hostkey.pub').read_text()}")
            config.append(
                f"Host {node.name}\n"
                f"    ProxyCommand nsenter --net=/run/netns/{self.switch.namespace(node.name)} nc 127.0.0.1 22\n"
            )
        (ssh / "known_hosts").write_text("".join(known))
        config.append(
            f"Host *\n    User root\n    IdentityFile {ssh}/id_ed25519\n    IdentitiesOnly yes\n"
            f"    UserKnownHostsFile {ssh}/known_hosts\n    StrictHostKeyChecking yes\n"
        )
        (ssh / "config").write_text("".join(config))

    # -- a node --------------------------------------------------------------------------------------------------

    def _boot(self, node: Node, key: str) -> None:
        started = time.monotonic()
        self.stop_node(node.name, kill=True)  # whatever a dead one left
        directory = self.state / "nodes" / node.name
        layers = Layers(directory)
        assert self.image is not None
        layers.mount(self.image)
        self.switch.plug(node, self.topology)
        self._identity(node, directory, key)
        command = [
            "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", f"--directory={layers.root}",
            f"--machine={self.machine(node.name)}", f"--hostname={node.name}.{self.topology.domain}",
            f"--network-namespace-path=/run/netns/{self.switch.namespace(node.name)}",
            "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--notify-ready=yes",
            "--capability=CAP_NET_ADMIN,CAP_SYS_ADMIN", "--system-call-filter=@keyring bpf", "--boot",
        ]  # fmt: skip
        if node.site:
            command[-1:-1] = [f"--bind={self.state}/sites/{node.site}/root:/srv/site"]
        # Writable /proc/sys/net, of the node's own network namespace only: routers forward.
        environment = {**os.environ, "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}
        console = directory / "console.log"
        if _host_runs_systemd():
            pid = self._start_unit(node.name, command, console)
        else:
            pid = self._start_process(node.name, command, console, environment)
        cgroups.grant(pid)
        (self.state / "leaders" / f"{node.name}.leader").write_text(str(pid))
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
        _make_key(partial, node.name)
        shutil.copy(partial, root / "etc/ssh/ssh_host_ed25519_key")
        (directory / "hostkey.pub").write_text(Path(f"{partial}.pub").read_text())
        Path(f"{partial}.pub").unlink()
        ssh = root / "root/.ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        (ssh / "authorized_keys").write_text(key)
        partial.rename(hostkey)

    def _start_process(self, name: str, command: list[str], console: Path, environment: dict[str, str]) -> int:
        """Start a node below this host's init and return the PID of its own; it says itself when it is ready."""
        groups = cgroups.make(f"{self.key}/{name}")
        leaders = self.state / "leaders"
        notify = leaders / f"{name}.notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(notify))
            listener.settimeout(0.5)
            join = "".join(f"echo $$ > {group}/cgroup.procs\n" for group in groups)
            with open(console, "w") as out:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", join + 'exec "$@"', "sh", *command], stdin=subprocess.DEVNULL, stdout=out,
                    stderr=subprocess.STDOUT, start_new_session=True, cwd="/",
                    env={**environment, "NOTIFY_SOCKET": str(notify)},
                )  # fmt: skip
            (leaders / f"{name}.nspawn").write_text(str(process.pid))
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

    def _start_unit(self, name: str, command: list[str], console: Path) -> int:
        """Start a node as a transient unit of the host's systemd and return the PID of its init."""
        unit = self.unit(name)
        properties = (
            "Type=notify", "NotifyAccess=all", "Delegate=yes", "KillMode=mixed", f"TimeoutStartSec={BOOT_TIMEOUT}",
        )  # fmt: skip
        done = subprocess.run(
            ["systemd-run", "--quiet", "--collect", f"--unit={unit}", "--slice=machine.slice",
             "--setenv=SYSTEMD_NSPAWN_API_VFS_WRITABLE=network", f"--property=StandardOutput=truncate:{console}",
             *(f"--property={value}" for value in properties), *command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise _boot_failure(name, console)
        shown = subprocess.run(
            ["systemctl", "show", "--property=MainPID", "--value", unit], capture_output=True, text=True, check=True
        )
        return _child(int(shown.stdout))


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock of all labs: two that begin together do not clear the same dead one."""
    with open(LABS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_key(path: Path, comment: str) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)], check=True)


def _child(pid: int) -> int:
    """Return the node's init: the one child of its nspawn."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _boot_failure(name: str, console: Path) -> LabError:
    tail = "\n".join(console.read_text(errors="replace").splitlines()[-12:])
    return LabError(f"node {name} did not boot within {BOOT_TIMEOUT} s; its console ends with:\n{tail}")
