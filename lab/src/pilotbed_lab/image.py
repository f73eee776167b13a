"""The node image: one Debian root file system that every local node boots through an overlay.

It holds the packages of all roles (``roles/*/vars/main.yml``), so that a role only configures. Packages that no root
file system can have beside those of other roles (``NAME_conflicting_packages``) lie in it as files, in the only apt
source that a node has: their role installs them there, as on any other machine, and without a network.
Built once, kept outside the checkout under a hash of what defines it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import yaml

from . import LabError

#: Where images are kept: outside every checkout, so that a second one finds them.
CACHE = Path("/var/cache/pilotbed")

SUITE = "trixie"
NEXT_SUITE = "forky"
#: Taken from the next release: trixie's HTCondor 23.9.6 cannot receive a delegated proxy with OpenSSL 3.5
#: ("delegation failed: X509Credential::Request() failed").
FROM_NEXT = ("condor", "libpcre2-8-0")

#: What a bootable node needs besides the roles' packages; Ansible's `apt` works by python3-apt.
GROUND = ("apt", "python3-apt", "systemd", "systemd-sysv", "libpam-systemd", "python3-yaml", "nftables", "kmod")

#: What `make bench-relay` compares the relay with; it runs over the image. No unit of it is enabled.
BENCH = ("haproxy", "socat", "openssh-client", "openssh-server")

#: What tests/glexec has payloads leave jobs with, and whose mapping it compares ours with. No unit of it is enabled.
ATTACKED = ("cron", "at", "nordugrid-arc-plugins-lcas-lcmaps")

#: How a role's list of packages is called that only machines with a kernel of their own need.
MACHINE_ONLY = "_machine_packages"

#: Units that may start by themselves; every other unit of a package waits for its role.
KEEP = ("dbus", "getty", "remote-fs", "ssh.", "systemd-", "timers.target.wants/systemd", "sockets")

#: Run with the new root as its argument. Packages that conflict with others there come with what they depend on; the
#: mirror's lists go, and apt knows this source alone.
APART = r"""
set -eu
cd "$1"
source=/usr/share/pilotbed-packages
mkdir -p ".$source/partial"
for name in {names}; do
    APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get --yes --download-only --option "Dir::Cache::archives=$1$source" \
        install "$name"
done
(
    cd ".$source"
    rm -rf partial lock
    for file in *.deb; do
        [ -e "$file" ] || continue
        dpkg-deb --field "$file"
        printf 'Filename: ./%s\nSize: %s\n' "$file" "$(stat --format %s "$file")"
        printf 'SHA256: %s\n\n' "$(sha256sum <"$file" | cut -d ' ' -f 1)"
    done >Packages
)
echo "deb [trusted=yes] file:$source ./" >etc/apt/sources.list
rm -rf var/lib/apt/lists/*
chroot . apt-get update
"""

#: Run with the new root as its argument. What makes two builds differ, or a key shared by all nodes, goes.
TIDY = r"""
set -eu
cd "$1"
rm -f etc/resolv.conf etc/ssh/ssh_host_* etc/machine-id var/lib/dbus/machine-id var/log/*.log var/log/apt/*
rm -rf var/cache/apt/*.bin usr/share/locale/* var/lib/condor/spool/*
# Installing A-REX makes a test CA, with its private key, and trusts it.
rm -rf etc/arc.conf.d/*testCA* etc/grid-security/testCA* etc/grid-security/certificates/*
for unit in etc/systemd/system/*.wants/*; do
    case "$unit" in {keep}) ;; *) rm -f "$unit" ;; esac
done
for script in etc/init.d/*; do
    name=${{script##*/}}
    [ -e "usr/lib/systemd/system/$name.service" ] || ln -sf /dev/null "etc/systemd/system/$name.service"
done
touch etc/machine-id
"""


#: Of a root file system without the packages of any role, run as the one above.
PLAIN = r"""
set -eu
cd "$1"
rm -f etc/resolv.conf etc/ssh/ssh_host_* etc/machine-id var/lib/dbus/machine-id
touch etc/machine-id
"""


def packages(checkout: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the Debian packages that the roles of ``checkout`` install.

    Returns:
        Those of the image, and those that conflict with some of them.

    Raises:
        LabError: a role's package list is not a list of names.
    """
    together, apart = {*GROUND, *FROM_NEXT, *BENCH, *ATTACKED}, set[str]()
    for path in sorted(checkout.glob("roles/*/vars/main.yml")):
        for key, value in (yaml.safe_load(path.read_text()) or {}).items():
            if key.endswith("_packages") and not key.endswith(MACHINE_ONLY):
                if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                    raise LabError(f"{path}: {key} is not a list of package names")
                (apart if key.endswith("_conflicting_packages") else together).update(value)
    return sorted(together), sorted(apart)


def path_of(checkout: Path) -> Path:
    """Return where the image that ``checkout`` defines is, or will be."""
    together, apart = packages(checkout)
    definition = "\n".join([SUITE, NEXT_SUITE, *FROM_NEXT, APART, TIDY, *KEEP, *together, "", *apart])
    return CACHE / f"image-{hashlib.sha256(definition.encode()).hexdigest()[:12]}"


def sources() -> list[str]:
    """Return the apt sources of the image, taken from the host's own apt configuration.

    Raises:
        LabError: the host has no Debian source to take the mirror from.
    """
    command = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    sites = {(site, "security" in release) for site, release, component in (x.split() for x in lines if x)
             if component == "main" and "debian" in site}
    main = sorted(site for site, security in sites if not security)
    if not main:
        raise LabError("apt has no Debian source with the component main: give it one (/etc/apt/sources.list.d)")
    key = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    found = [f"deb {key} {main[0]} {suite} main" for suite in (SUITE, f"{SUITE}-updates", NEXT_SUITE)]
    found += [f"deb {key} {site} {SUITE}-security main" for site, security in sorted(sites) if security]
    return found


def next_source() -> str:
    """Return the apt source of the next release, as a machine without our image's packages is told of it.

    Raises:
        LabError: as for `sources`.
    """
    return sources()[2].partition("] ")[2]


def _preferences() -> str:
    """Return the apt pins: nothing from the next release but what ``FROM_NEXT`` names."""
    pin = "Package: {}\nPin: release n={}\nPin-Priority: {}\n"
    return "\n".join([pin.format("*", NEXT_SUITE, 50), pin.format(" ".join(FROM_NEXT), NEXT_SUITE, 600)])


def build(checkout: Path, log: Path) -> Path:
    """Return the path of the image, building it first if it is not there.

    Args:
        checkout: the project's directory.
        log: file that takes the builder's output.

    Raises:
        LabError: the build failed; the message ends with the log's last lines.
    """
    image = path_of(checkout)
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second checkout waits for the first one's build
        if image.is_dir():
            return image
        partial = image.with_suffix(".partial")
        bootstrap(checkout, partial, log)
        partial.rename(image)
    return image


def bootstrap(
    checkout: Path, root: Path, log: Path, more: Iterable[str] = (), finish: str = "", plain: bool = False
) -> None:
    """Make the root file system that ``checkout`` defines.

    Args:
        checkout: the project's directory.
        root: where; what is there goes.
        log: file that takes the builder's output.
        more: Debian packages that it has beside those of the image.
        finish: shell script that is run at the end, with the new root as its argument.
        plain: leave the packages of all roles out: Debian alone, whose apt knows this release on the host's mirror.

    Raises:
        LabError: the build failed; the message ends with the log's last lines.
    """
    subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)
    together, apart = (GROUND, ()) if plain else packages(checkout)
    with tempfile.TemporaryDirectory() as scratch:
        preferences = Path(scratch, "preferences")
        preferences.write_text(_preferences())
        hooks = {
            "apart": APART.format(names=" ".join(apart)),
            "tidy": TIDY.format(keep="|".join(f"*/{unit}*" for unit in KEEP)),
            "finish": finish,
        }
        if plain:
            preferences.write_text("")
            hooks = {"plain": PLAIN, "finish": finish}
        for name, text in hooks.items():
            Path(scratch, name).write_text("#!/bin/sh\n" + text)
            Path(scratch, name).chmod(0o755)
        command = [
            # In a mount namespace of its own: killed half-way, the builder leaves /proc and /sys mounted in the
            # partial root, where the next one's clean-up would go down into them.
            "unshare", "--mount", "--propagation=private", "--",
            "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory",
            "--include=" + ",".join([*together, *more]),
            # Written once per file instead of synced: a failed build is thrown away as a whole.
            "--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            '--dpkgopt=path-exclude=/usr/share/doc/*',
            "--aptopt=Acquire::Languages \"none\"",
            *_apt_options(),
            f'--setup-hook=d="$1/etc/apt/preferences.d" && mkdir -p "$d" && cp {preferences} "$d/pilotbed"',
            # A-REX's installation asks for the host's full name ("hostname: Name or service not known").
            '--essential-hook=printf "127.0.0.1 localhost\\n127.0.1.1 image.invalid $(hostname)\\n" '
            '> "$1/etc/hosts"',
            *(f'--customize-hook={scratch}/{name} "$1"' for name in hooks),
            # The lists of the image's own source stay.
            "--skip=cleanup/apt/lists",
            SUITE, str(root), *sources()[: 2 if plain else None],
        ]
        with open(log, "w") as out:
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False, env=_environment())
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise LabError(f"building the node image failed; the end of {log}:\n{tail}")


def _environment() -> dict[str, str]:
    """Return what of the caller's environment the builder may see: maintainer scripts look at more than one thinks.

    With CONDOR_CONFIG set, HTCondor's makes its log directory elsewhere, and condor_master ends with status 4.
    """
    kept = ("PATH", "HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LANG": "C.UTF-8"}


def _apt_options() -> list[str]:
    """Return the host's relaxations of apt's date checks: a frozen mirror needs them in the image, too."""
    found = []
    for option in ("Acquire::Check-Valid-Until", "Acquire::Check-Date"):
        value = subprocess.run(["apt-config", "dump", option], check=True, capture_output=True, text=True).stdout
        if '"false"' in value:
            found.append(f'--aptopt={option} "false"')
    return found


if __name__ == "__main__":
    started = time.monotonic()
    print(build(Path(sys.argv[1]), Path(sys.argv[2])), f"{time.monotonic() - started:.0f} s")
