"""Directories made of read-only layers and one writable one on top, so that a snapshot copies nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from . import LabError


class Layers:
    """One such directory.

    Args:
        path: directory that holds ``upper``, ``work``, ``root`` (the mount) and ``layers`` (a list of paths).
    """

    def __init__(self, path: Path):
        self.path = path
        self.root = path / "root"

    def mount(self, base: Path) -> None:
        """Mount the directory at ``root``; ``base`` is the lowest layer of a new one.

        Raises:
            LabError: the kernel refuses.
        """
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
        )  # fmt: skip
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


def mounts_below(directory: Path) -> list[str]:
    """Return the mount points below ``directory``, in the order in which they were mounted."""
    with open("/proc/self/mounts") as mounts:
        return [line.split()[1] for line in mounts if line.split()[1].startswith(f"{directory}/")]


def unmount(path: Path) -> None:
    """Unmount ``path`` and what is mounted below it, if it is a mount; who still uses it may go on."""
    if path.is_dir() and path.is_mount():
        subprocess.run(["umount", "--recursive", "--lazy", str(path)], check=False)
