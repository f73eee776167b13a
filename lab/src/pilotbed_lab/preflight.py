"""What the host must have for the lab; asked before anything is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from . import LabError

#: Free disk that the image and a lab need, in bytes.
DISK = 4 * 1024**3


def check() -> None:
    """Check this host.

    Raises:
        LabError: something is missing; the message says what and how to get it.
    """
    if os.geteuid() != 0:
        raise LabError("the lab makes namespaces, mounts and bridges: run it as root")
    if not _has_overlayfs(Path("/proc/filesystems")):
        raise LabError("this kernel has no overlayfs, which every node is mounted with: load it (modprobe overlay)")
    # In a network namespace of its own: the host's rules are not touched.
    asked = subprocess.run(
        ["unshare", "--net", "nft", "add", "table", "inet", "pilotbed"], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        raise LabError(
            "this kernel has no nftables, which the sites' packet filters are made of: load it (modprobe nf_tables, "
            f"nf_nat); nft says: {asked.stderr.strip()}"
        )
    place = next(path for path in (Path("/var/lib/pilotbed"), Path("/var/lib")) if path.exists())
    free = shutil.disk_usage(place).free
    if free < DISK:
        raise LabError(f"{place} has {free / 1024**3:.1f} GiB free, the lab needs {DISK / 1024**3:.0f}: make room")


def _has_overlayfs(filesystems: Path) -> bool:
    """Return whether the kernel has overlayfs, trying to load it first where it is a module."""
    if "overlay" not in filesystems.read_text().split():
        subprocess.run(["modprobe", "--quiet", "overlay"], capture_output=True, check=False)
    return "overlay" in filesystems.read_text().split()
