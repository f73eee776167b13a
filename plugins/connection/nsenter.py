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

import os
import shlex
import subprocess
from pathlib import Path

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

#: Put before a module that comes by standard input. Python compiles what it imports from a zip file each time anew, and
#: a module brings Ansible's own code in one: half of what a task cost. The node keeps what it has compiled.
KEEPS_COMPILED = b"""\
import hashlib, marshal, os, sys, zipimport
def kept(name, source, anew=zipimport._compile_source, directory="/var/cache/ansible-compiled"):
    path = f"{directory}/{hashlib.sha256(sys.version.encode() + source).hexdigest()}"
    try:
        with open(path, "rb") as file:
            return marshal.load(file)
    except (OSError, EOFError, ValueError, TypeError):
        code = anew(name, source)
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        with open(f"{path}.{os.getpid()}", "wb") as file:
            marshal.dump(code, file)
        os.rename(file.name, path)
    except OSError:
        pass
    return code
zipimport._compile_source = kept
exec(compile(%r, "<stdin>", "exec"))
"""


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
            self._connected = True
        return self

    def _run(self, argv, stdin=None, stdout=subprocess.PIPE):
        command = ["nsenter", "--target", self._pid, "--all", "--", "/usr/bin/env", "-i", *ENVIRONMENT, *argv]
        done = subprocess.run(
            command,
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
            in_data = KEEPS_COMPILED % in_data
        return self._run(["/bin/sh", "-c", cmd], in_data)

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
