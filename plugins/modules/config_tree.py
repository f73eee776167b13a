"""Node side of config_tree: put files and units into the state that the controller rendered.

Read as text by the action plugin and run there by ``python3 -I``, with the wanted state on standard input: one start of
Python for a role's whole tree, where a loop of template tasks starts it twice a file.
"""

from __future__ import annotations

DOCUMENTATION = r"""
module: config_tree
short_description: Install a role's whole configuration tree in one run
description:
  - Renders C(templates/**) and copies C(files/**) of the role to the same paths on the node.
  - A template that renders to nothing stands for a file that must not exist; a unit is stopped before its file goes.
  - What the same task has made for an item that is no longer there is taken away. Its files are removed, and units that
    are instances (C(NAME@ITEM.service)) stopped and disabled.
  - Files in C(sysusers.d) are applied before owners are set, files in C(tmpfiles.d) after all files.
  - Units are enabled and started, and restarted when a file of the tree changed. One that runs a program of ours is
    restarted when a file changed that the program imports, too; the controller finds these by its import statements.
options:
  attributes:
    description: Owner, group and mode of files, by path. The default is root, root, 0644 (0755 if executable).
    type: dict
    default: {}
  items:
    description: A file whose path names C(item) is there once for each of these, and rendered with it as C(item).
    type: list
    elements: raw
    default: []
  trees:
    description: Other roles whose trees are installed in the same run, before the role's own.
    type: list
    elements: str
    default: []
  units:
    description: The systemd units that read this tree.
    type: list
    elements: str
    default: []
  restart:
    description: Restart the units even if nothing in the tree changed.
    type: bool
    default: false
author: pilotbed
"""

EXAMPLES = r"""
- name: Configure Squid
  config_tree:
    units: [squid.service]
"""

import base64
import datetime
import difflib
import grp
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

UNITS_DIR = "/etc/systemd/system/"
#: What tasks have made for items: {task: [file or unit, ...]}.
RECORD = Path("/var/lib/pilotbed/of-items.json")


def _run(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def _seconds(timestamp):
    """Return systemd's "Sat 2026-11-21 01:39:05.835646 UTC" as seconds since the epoch; 0 for a unit never active."""
    if not timestamp:
        return 0
    moment = datetime.datetime.strptime(timestamp, "%a %Y-%m-%d %H:%M:%S.%f UTC")
    return moment.replace(tzinfo=datetime.UTC).timestamp()


def _newest(paths):
    """Return when the last one of these files changed, in seconds since the epoch."""
    return max((path.stat().st_ctime for path in paths if path.exists()), default=0)


class Tree:
    """The wanted files, compared with and written to the node's file system."""

    def __init__(self, wanted):
        self.wanted = wanted
        self.check = wanted["check"]
        self.changed = []
        self.diff = []

    def apply(self):
        """Bring files, accounts, directories and units into the wanted state; return Ansible's result."""
        ended = self._forget_items()
        files = self.wanted["files"]
        early = [path for path in files if Path(path).parent.name == "sysusers.d"]
        for path in early:
            if self._install(path, files[path]) and not self.check:
                self._must("systemd-sysusers", path)
        for path in files:
            if path in early or not self._install(path, files[path]) or self.check:
                continue
            if Path(path).parent.name == "tmpfiles.d":
                self._must("systemd-tmpfiles", "--create", path)
        if not self.check and any(path.startswith(UNITS_DIR) for path in self.changed):
            self._must("systemctl", "daemon-reload")
        units = ended + self._units()
        return {"changed": bool(self.changed or units), "files": self.changed, "units": units, "diff": self.diff}

    def _forget_items(self):
        """Take away what this task has made for items that are no longer there; return the units among it."""
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        units = [unit for unit in self.wanted["units"] if "@" in unit]
        before, now = record.get(self.wanted["task"], []), sorted({*self.wanted["of_items"], *units})
        if before == now:
            return []
        left = [each for each in before if each not in now]
        ended = [each for each in left if not each.startswith("/")]
        if not self.check:
            self._end(ended)
        for path in left:
            if path.startswith("/"):
                self._install(path, {"content": None, "mode": "0600"})
        if not self.check:
            # After what is taken away and before what is made: a run that is cut off between forgets neither.
            RECORD.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._replace(RECORD, json.dumps(record | {self.wanted["task"]: now}).encode(), 0, 0, 0o644)
        return ended

    def _must(self, *argv):
        done = _run(*argv)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")

    def _install(self, path, entry):
        target = Path(path)
        if entry["content"] is None:
            if not target.is_symlink() and not target.exists():
                return False
            self._note(path, target.read_bytes() if target.exists() else b"", b"", entry)
            if not self.check:
                if f"{target.parent}/" == UNITS_DIR:
                    self._end([target.name])  # of one without a file systemd says that there is none
                target.unlink()
            return True
        content = base64.b64decode(entry["content"])
        mode = int(entry["mode"], 8)
        try:
            owner, group = pwd.getpwnam(entry["owner"]).pw_uid, grp.getgrnam(entry["group"]).gr_gid
        except KeyError as error:
            if self.check:  # an account that this very tree would make
                self._note(path, b"", content, entry)
                return True
            raise RuntimeError(f"{path}: {error.args[0]}; make the account in this tree's sysusers.d") from error
        before = b""
        if target.is_file() and not target.is_symlink():
            before, stat = target.read_bytes(), target.stat()
            if before == content and (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (owner, group, mode):
                return False
        self._note(path, before, content, entry)
        if not self.check:
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._replace(target, content, owner, group, mode)
        return True

    def _end(self, units):
        """Stop and disable units, of a template all instances; one that is not known any more is no mistake."""
        for unit in units:
            running = unit.replace("@.", "@*.")
            said = _run("systemctl", "disable", "--quiet", unit).stderr + _run("systemctl", "stop", running).stderr
            if not _run("systemctl", "is-active", "--quiet", running).returncode:
                raise RuntimeError(f"{unit} is not wanted any more, and runs on: {said.strip()}")

    def _replace(self, target, content, owner, group, mode):
        # Beside the target and then renamed: a reader sees the old file or the new one, a full disk loses neither.
        partial = target.with_name(f".{target.name}.pilotbed")
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(content)
            os.fchown(out.fileno(), owner, group)
            os.fchmod(out.fileno(), mode)
        partial.replace(target)

    def _note(self, path, before, after, entry):
        self.changed.append(path)
        if not self.wanted["diff"]:
            return
        if int(entry["mode"], 8) & 0o044 != 0o044:
            self.diff.append({"prepared": f"{path}: content is not shown, not everybody may read it\n"})
            return
        old, new = (text.decode(errors="replace").splitlines(True) for text in (before, after))
        lines = difflib.unified_diff(old, new, path, path)
        self.diff.append({"prepared": "".join(lines) or f"{path}: owner or mode\n"})

    def _units(self):
        names = self.wanted["units"]
        if not names:
            return []
        properties = "--property=ActiveState,UnitFileState,ActiveEnterTimestamp"
        shown = _run("systemctl", "show", "--timestamp=us+utc", properties, *names).stdout
        states = [dict(line.split("=", 1) for line in block.splitlines()) for block in shown.strip().split("\n\n")]
        # By time, not by what this run changed: a run that was cut off between file and restart is made good.
        newest = _newest(map(Path, self.wanted["files"]))
        programs = {unit: _newest(map(Path, paths)) for unit, paths in self.wanted.get("programs", {}).items()}
        restart = bool(self.changed) or self.wanted["restart"]
        settled = ("enabled", "static", "generated", "indirect", "alias")
        enable, touched = [], []
        for name, state in zip(names, states, strict=True):
            if state["UnitFileState"] not in settled:
                enable.append(name)
            running = state["ActiveState"] in ("active", "activating", "reloading")
            if not running or restart or max(newest, programs.get(name, 0)) > _seconds(state["ActiveEnterTimestamp"]):
                touched.append(name)
        if self.check:
            return sorted({*enable, *touched})
        if enable:
            self._must("systemctl", "enable", "--quiet", *enable)
        if touched:
            _run("systemctl", "reset-failed", *touched)
            # In one transaction: systemd knows what comes before what.
            done = _run("systemctl", "restart", *touched)
            if done.returncode:
                units = [f"--unit={name}" for name in touched]
                journal = _run("journalctl", *units, "--lines=25", "--no-pager", "--output=cat").stdout
                raise RuntimeError(f"{', '.join(touched)}: {done.stderr.strip()}\n{journal}")
        return sorted({*enable, *touched})


def main(wanted):
    """Print the result of applying ``wanted`` as JSON."""
    try:
        result = Tree(wanted).apply()
    except (OSError, RuntimeError) as error:
        result = {"failed": True, "msg": str(error)}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(json.load(sys.stdin)["wanted"])
