"""A root file system over the node image, in mount, network, process and IPC namespaces of its own.

For what needs a node's packages and root's rights, but neither the grid nor the host's network: benches and tests.
Nothing of it outlives its first process, and that one not the process that started it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

#: Run as `sh -euc`, with the image, an empty directory, the modules' directories as one word, and the command.
_SCRIPT = r"""
image=$1 scratch=$2 modules=$3
shift 3
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay pilotbed -o "lowerdir=$image,upperdir=$scratch/upper,workdir=$scratch/work" "$scratch/root"
cd "$scratch/root"
# The host's own /dev would have its /dev/log.
mount -t tmpfs -o mode=0755 tmpfs dev
for device in null zero full random urandom tty; do
    : >"dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
ln -s /proc/self/fd dev/fd
mkdir dev/shm dev/pts
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=0755 tmpfs run
mount -t tmpfs tmpfs tmp
paths=
for directory in $modules; do
    inside=opt/pilotbed$(printf %s "$directory" | tr / -)
    mkdir -p "$inside"
    mount --bind "$directory" "$inside"
    paths=$paths${paths:+:}/$inside
done
# Not only chroot: who enters these namespaces later must not come out on the host's root.
mkdir -p mnt
pivot_root . mnt
umount --lazy mnt
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH="$paths" "$@"
"""


def command(
    image: Path, scratch: Path, *argv: str, modules: Sequence[Path] = (), cgroup: bool = False
) -> list[str]:
    """Return the command that runs ``argv`` as first process of a root over the image.

    Args:
        image: the node image (`image`).
        scratch: an empty directory; for everybody else it stays one.
        argv: program and arguments, in the new root.
        modules: directories of Python modules that ``argv`` may import.
        cgroup: give it a cgroup namespace, too; its root is the cgroup that the command is started in.
    """
    namespaces = ["--mount", "--net", "--pid", "--ipc", *(["--cgroup"] if cgroup else [])]
    return [
        "setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "--fork", "--kill-child", "--",
        "sh", "-euc", _SCRIPT, "sh", str(image), str(scratch), " ".join(map(str, modules)), *argv,
    ]  # fmt: skip
