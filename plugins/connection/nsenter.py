"""Connection plugin: enter the namespaces of a local node through its init."""

from __future__ import annotations

DOCUMENTATION = r"""
name: nsenter
short_description: run tasks in a local systemd-nspawn node through nsenter(1)
description:
  - Enters every namespace of the node's init. No sshd, no machined, nothing on a network.
options:
  node:
    description:
      - Name of the node. In a delegated task only ansible_host names it, inventory_hostname is still the delegator's.
    type: string
    required: true
    vars:
      - name: inventory_hostname
      - name: ansible_host
  leaders:
    description:
      - Directory that holds, as NODE.leader, the PID on this host of each node's init.
      - By itself that of this checkout's lab called LAB (environment). In the inventory it would be a template, and is
        read with each task.
    type: path
    vars:
      - name: ansible_nsenter_leaders
extends_documentation_fragment:
  - connection_pipelining
"""

import contextlib
import hashlib
import os
import shlex
import socket
import subprocess
import zipfile
from pathlib import Path

import ansible
from ansible.errors import AnsibleConnectionFailure, AnsibleFileNotFound
from ansible.plugins.connection import ConnectionBase
from ansible.utils.display import Display

display = Display()

CHECKOUT = Path(__file__).resolve().parents[2]

ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "USER=root",
    "LOGNAME=root",
    "LANG=C.UTF-8",
    "SHELL=/bin/bash",
)

#: How a module is run that comes by standard input.
MODULE = "/bin/sh -c '/usr/bin/python3 && sleep 0'"

#: What a node runs that forks itself for each of them.
FORKSERVER = (CHECKOUT / "lab/src/pilotbed_lab/forkserver.py").read_bytes()
#: So that none of them serves another Ansible's modules, or another version of it.
VERSION = hashlib.sha256(FORKSERVER + ansible.__version__.encode()).hexdigest()[:8]
#: Seconds that one waits for another module.
IDLE = 20


@contextlib.contextmanager
def short(path):
    """Yield a name for the path that a socket can have: one of over 107 bytes is refused ("AF_UNIX path too long")."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextlib.contextmanager
def library():
    """Yield an open file: Ansible's module_utils, as a zip file."""
    top = Path(ansible.__file__).parent
    with open(os.memfd_create("module_utils"), "w+b") as made:
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("ansible/__init__.py", "")
            for path in sorted(top.glob("module_utils/**/*.py")):
                archive.write(path, path.relative_to(top.parent))
        made.flush()
        yield made


class Connection(ConnectionBase):
    """A node on this host, entered as root."""

    transport = "nsenter"
    has_pipelining = True
    has_tty = False

    def _connect(self):
        if not self._connected:
            leaders = self.get_option("leaders") or CHECKOUT / "var/labs" / (os.environ.get("LAB") or "lab") / "leaders"
            leader = Path(leaders, f"{self.get_option('node')}.leader")
            try:
                self._pid = str(int(leader.read_text()))
            except (OSError, ValueError) as error:
                raise AnsibleConnectionFailure(f"the node is not running ({error}): `make lab` boots it") from error
            if not Path("/proc", self._pid, "ns").is_dir():
                raise AnsibleConnectionFailure(f"the node is not running (no process {self._pid}): `make lab` boots it")
            self._door = leader.with_suffix(f".{VERSION}")
            self._connected = True
        return self

    def _command(self, argv):
        return ["nsenter", "--target", self._pid, "--all", "--", "/usr/bin/env", "-i", *ENVIRONMENT, *argv]

    def _run(self, argv, stdin=None, stdout=subprocess.PIPE):
        done = subprocess.run(
            self._command(argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=stdout,
            stderr=subprocess.PIPE,
            cwd="/",
            check=False,
        )
        return done.returncode, done.stdout or b"", done.stderr

    def exec_command(self, cmd, in_data=None, sudoable=True):
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        display.vvv(f"NSENTER {cmd}", host=self._play_context.remote_addr)
        if in_data and in_data.startswith(b"#!/usr/bin/python3"):
            # Another user's, or one in another environment, runs by itself.
            if cmd == MODULE and (said := self._forked(in_data)):
                return said
            display.vvv("this module gets a Python of its own", host=self._play_context.remote_addr)
        return self._run(["/bin/sh", "-c", cmd], in_data)

    def _forked(self, module):
        """Run a module in a process that the node keeps for that; return None where that cannot be."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(os.memfd_create(name), "w+b")) for name in ("module", "out", "err")]
            files[0].write(module)
            files[0].seek(0)
            # Refused, or left without a word: there is no such process, or it has just ended; the module has not begun.
            for start in (False, True):
                line = stack.enter_context(socket.socket(socket.AF_UNIX))
                try:
                    if start:
                        self._start_forkserver()
                    line.connect(stack.enter_context(short(self._door)))
                    socket.send_fds(line, [b"m"], [file.fileno() for file in files])
                    begun = line.recv(1)
                except OSError:
                    continue
                if begun:
                    code = line.makefile("rb").read() or b"-9"
                    return int(code), *(Path("/proc/self/fd", str(file.fileno())).read_bytes() for file in files[1:])
        return None

    def _start_forkserver(self):
        mine = Path(f"{self._door}.{os.getpid()}")
        with socket.socket(socket.AF_UNIX) as door, library() as shared:
            with short(mine) as name:
                door.bind(name)
            mine.chmod(0o600)
            door.listen()
            mine.rename(self._door)
            files = (door.fileno(), shared.fileno())
            process = subprocess.Popen(
                self._command(["/usr/bin/python3", "-", *map(str, files), str(IDLE)]),
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                pass_fds=files, start_new_session=True,
            )  # fmt: skip
            with process.stdin:
                process.stdin.write(FORKSERVER)

    # Files go through the node's own shell, never through /proc/PID/root: the node's absolute symbolic links
    # would resolve on the host.
    def put_file(self, in_path, out_path):
        super().put_file(in_path, out_path)
        try:
            data = Path(in_path).read_bytes()
        except FileNotFoundError as error:
            raise AnsibleFileNotFound(in_path) from error
        code, _, stderr = self._run(["/bin/sh", "-c", f"cat > {shlex.quote(out_path)}"], data)
        if code:
            raise AnsibleConnectionFailure(f"cannot write {out_path} on the node: {stderr.decode(errors='replace')}")

    def fetch_file(self, in_path, out_path):
        super().fetch_file(in_path, out_path)
        with open(out_path, "wb") as out:
            code, _, stderr = self._run(["/bin/sh", "-c", f"cat {shlex.quote(in_path)}"], stdout=out)
        if code:
            raise AnsibleConnectionFailure(f"cannot read {in_path} on the node: {stderr.decode(errors='replace')}")

    def close(self):
        self._connected = False
