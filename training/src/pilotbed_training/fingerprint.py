"""What a grid looks like: files, units, packet filters, routes of every node; and what is different later on.

A lesson takes it of the healthy grid. When the lesson's fault is mended, nothing else may have been changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

from pilotbed_suite import inventory
from pilotbed_suite.reach import host

from . import TrainingError

#: Of each node: items, and what each is like.
Fingerprint = dict[str, dict[str, str]]

#: Items that change by themselves: the CRL by a timer, also while it is fetched, compiled modules, what the network's
#: configuration keeps.
VOLATILE = (
    "file /etc/grid-security/certificates/*.r0", "file /etc/grid-security/certificates/.crl.*", "file /etc/resolv.conf",
    "file *__pycache__*",
)  # fmt: skip

#: Runs on a node; prints its items.
_LOOK = r"""
import hashlib, json, os, pwd, re, subprocess
found = {}
TOPS = ("/etc", "/usr/lib/pilotbed", "/usr/libexec/pilotbed", "/run/systemd/system", "/var/spool/cron",
        "/var/lib/pilotbed/factory/stage", "/var/lib/pilotbed/frontend/stage")
for top in TOPS:
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            try:
                status = os.lstat(path)
                if os.path.islink(path):
                    content = os.readlink(path).encode()
                elif os.path.isfile(path):
                    with open(path, "rb") as file:
                        content = file.read()
                else:
                    continue
            except OSError:
                continue
            what = hashlib.sha256(content).hexdigest()[:16]
            found["file " + path] = "%o %d:%d %s" % (status.st_mode, status.st_uid, status.st_gid, what)
def said(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout
for line in said("systemctl", "list-unit-files", "--no-legend", "--plain").splitlines():
    unit, state = line.split()[:2]
    if state not in ("transient", "generated"):
        found["enabled " + unit] = state
shown = said("systemctl", "show", "*.service", "*.socket", "*.timer", "--property",
             "Id,Type,ActiveState,UnitFileState,FragmentPath")
for block in shown.split("\n\n"):
    unit = dict(line.partition("=")[::2] for line in block.splitlines())
    if not unit.get("Id") or unit.get("FragmentPath", "").startswith("/run/systemd/transient"):
        continue
    if unit["ActiveState"] == "failed":
        found["unit " + unit["Id"]] = "failed"
    elif unit.get("Type") != "oneshot" and unit.get("UnitFileState") in ("enabled", "enabled-runtime"):
        found["unit " + unit["Id"]] = "runs" if unit["ActiveState"] in ("active", "activating") else "does not run"
found["packet filter"] = said("nft", "--stateless", "list", "ruleset")
for family in ("-4", "-6"):
    found["routes " + family] = said("ip", family, "route")
for directory in ("/proc/sys/net/netfilter", "/proc/sys/net/ipv4"):
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
        if re.search("timeout|tcp_(loose|be_liberal)|ip_forward$|conntrack_max", name):
            try:
                with open(directory + "/" + name) as file:
                    found["kernel %s/%s" % (directory.rpartition("/")[2], name)] = file.read().strip()
            except OSError:
                pass
print(json.dumps(found))
"""


def take() -> Fingerprint:
    """Return what every node of the inventory looks like.

    Raises:
        GridError: a node cannot be reached, or does not answer.
    """

    def look(name: str) -> dict[str, str]:
        done = host(name).run("python3 -I -c %s", _LOOK)
        if done.rc:
            raise TrainingError(f"{name} does not say what it looks like: {done.stderr.strip()[-500:]}")
        items: dict[str, str] = json.loads(done.stdout)
        return {item: what for item, what in items.items() if not any(fnmatchcase(item, each) for each in VOLATILE)}

    names = inventory.load().hosts()
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(look, names), strict=True))


def differences(
    before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]],
    allowed: Iterable[tuple[str, str]] = (),
) -> dict[tuple[str, str], str]:
    """Return a sentence for each item that is not as it was, by node and item.

    Args:
        before: the healthy grid.
        after: the grid now.
        allowed: what may differ: (host, pattern of an item).
    """
    allowed = list(allowed)
    told = {}
    for name, items in before.items():
        now = after.get(name, {})
        for item in sorted({*items, *now}):
            old, new = items.get(item), now.get(item)
            if old == new or any(each == name and fnmatchcase(item, pattern) for each, pattern in allowed):
                continue
            # A fetch of the CRL fails on a node that boots before the authority; its timer heals that.
            if old == "failed" and new in (None, "runs"):
                continue
            told[name, item] = f"{name}: {_sentence(item, old, new)}"
    return told


def _sentence(item: str, old: str | None, new: str | None) -> str:
    kind, _, rest = item.partition(" ")
    if kind == "unit":
        return f"{rest}: {_state(new)}; before: {_state(old)}"
    if kind == "enabled":
        return f"{rest} is {new or 'gone'}; before it was {old or 'not there'}"
    if kind == "kernel":
        return f"{rest.replace('/', '.')} is {new}; before it was {old}"
    if kind == "routes":
        return f"its routes are others (ip {rest} route)"
    if item == "packet filter":
        return "its packet filter is another (nft list ruleset)"
    return f"{rest} is {'gone' if new is None else 'new' if old is None else 'changed'}"


def _state(what: str | None) -> str:
    # A unit that is stopped is not even known to systemd, unless it failed.
    return {None: "does not run", "failed": "failed"}.get(what, what or "")
