"""``make box``: the node image as a Vagrant box, for libvirt and for VirtualBox (docs/vagrant.md).

The same root file system as that of local nodes (``image``), with a kernel, a boot loader and Vagrant's account: a
class needs no packages from anywhere. The disk is put together in files: nothing is mounted, no loop device is used.

``make box BOX=plain`` makes one without the packages of any role, as Debian's own is: roles then install them by apt.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

import yaml
from pilotbed_suite import CHECKOUT

from . import LabError, image

#: Which boxes there are, as BOX of the Makefile names them.
KINDS = ("node", "plain")
#: Where boxes are, and for each kind the catalogue by which Vagrant finds them, pilotbed-KIND.json.
BOXES = CHECKOUT / "var/box"

#: What a machine of its own needs beside a local node's packages.
MACHINE = (
    "e2fsprogs", "grub-common", "grub-pc-bin", "initramfs-tools", "linux-image-amd64", "systemd-resolved", "zstd",
)  # fmt: skip
#: What a plain one has that any machine has.
PLAIN = ("iproute2", "netbase", "openssh-server", "procps", "sudo")
#: Size of the disk, which takes what is written to it.
GIB = 20
#: Where the partition begins, in bytes; GRUB lies before it.
FIRST = 1 << 20

#: Everybody's, Vagrant puts one of its own in its place: https://github.com/hashicorp/vagrant/tree/main/keys
INSECURE_KEY = (
    "ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw+niNltGEFHzD8+v1I2YJ6oXevct"
    "1YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8dJSIFo9D8HfdOV0IAdx4O7PtixWKn5y2hMNG0zQPyUec"
    "p4pzC6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NOTd0jMZEnDkbUvxhMmBYSdETk1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF96hruc"
    "XzcWyLbIbEgE98OHlnVYCzRdK8jlqm8tehUc9c9WhQ== vagrant insecure public key"
)

#: Run with the new root as its argument. Interfaces are called eth0 (Vagrant's own), eth1, …
MACHINE_OF_ITS_OWN = rf"""
set -eu
cd "$1"
chroot . useradd --create-home --shell /bin/bash vagrant
install -d -m 0700 home/vagrant/.ssh
echo "{INSECURE_KEY}" >home/vagrant/.ssh/authorized_keys
chmod 0600 home/vagrant/.ssh/authorized_keys
chroot . chown -R vagrant:vagrant /home/vagrant/.ssh
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >etc/sudoers.d/vagrant
chmod 0440 etc/sudoers.d/vagrant
# The name of a client is looked up otherwise, by a name server that may not be there.
echo 'UseDNS no' >etc/ssh/sshd_config.d/vagrant.conf
# Host keys come at the first boot. What Debian calls one enables all units, by systemd's presets, also those that wait
# for their roles ("sshd: no hostkeys available" where machine-id is empty, so that this is none).
install -d etc/systemd/system/sshd-keygen.service.d
printf '[Unit]\nConditionFirstBoot=\n' >etc/systemd/system/sshd-keygen.service.d/always.conf
echo pilotbed >etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 pilotbed\n' >etc/hosts
echo 'LABEL=pilotbed / ext4 errors=remount-ro 0 1' >etc/fstab
printf '[Match]\nName=eth0\n[Network]\nDHCP=ipv4\n[DHCPv4]\nClientIdentifier=mac\n' >etc/systemd/network/20-eth0.network
chroot . systemctl enable systemd-networkd.service systemd-resolved.service ssh.service
ln -sf ../run/systemd/resolve/stub-resolv.conf etc/resolv.conf
# Disks of both providers, and no more: a small initial RAM disk boots faster.
sed -i 's/^MODULES=.*/MODULES=list/' etc/initramfs-tools/initramfs.conf
printf '%s\n' virtio_pci virtio_blk virtio_scsi ahci ata_piix sd_mod ext4 >>etc/initramfs-tools/modules
chroot . update-initramfs -u -k all
# Else the first boot makes systemd's hardware database and others again, as after an update of /usr.
touch -r usr etc/.updated var/.updated
cat >boot/grub.cfg <<'END'
linux /vmlinuz root=LABEL=pilotbed ro net.ifnames=0 console=tty0 console=ttyS0 quiet
initrd /initrd.img
boot
END
chroot . grub-mkimage --format=i386-pc '--prefix=(hd0,msdos1)/boot' --output=/boot/core.img \
    biosdisk part_msdos ext2 normal linux
cp usr/lib/grub/i386-pc/boot.img boot/
"""

#: A machine as VirtualBox reads it; Vagrant gives it its memory and networks.
OVF = """<?xml version="1.0"?>
<Envelope ovf:version="1.0" xmlns="http://schemas.dmtf.org/ovf/envelope/1" xml:lang="en-US"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References><File ovf:id="file1" ovf:href="box.vmdk"/></References>
  <DiskSection>
    <Info>Disks</Info>
    <Disk ovf:capacity="{bytes}" ovf:diskId="vmdisk1" ovf:fileRef="file1"
     ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <NetworkSection><Info>Networks</Info><Network ovf:name="NAT"/></NetworkSection>
  <VirtualSystem ovf:id="pilotbed-node">
    <Info>A node of pilotbed</Info>
    <OperatingSystemSection ovf:id="96"><Info>Debian, 64 bits</Info></OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Hardware</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>pilotbed-node</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>virtualbox-2.2</vssd:VirtualSystemType>
      </System>
      <Item>
        <rasd:ElementName>1 processor</rasd:ElementName><rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits>
        <rasd:ElementName>memory</rasd:ElementName><rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>512</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:ElementName>SATA</rasd:ElementName><rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>AHCI</rasd:ResourceSubType><rasd:ResourceType>20</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:ElementName>disk</rasd:ElementName><rasd:HostResource>/disk/vmdisk1</rasd:HostResource>
        <rasd:InstanceID>4</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation><rasd:Connection>NAT</rasd:Connection>
        <rasd:ElementName>network</rasd:ElementName><rasd:InstanceID>5</rasd:InstanceID>
        <rasd:ResourceSubType>E1000</rasd:ResourceSubType><rasd:ResourceType>10</rasd:ResourceType>
      </Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"""


def packages(checkout: Path, kind: str) -> list[str]:
    """Return the Debian packages of a box beside those of the node image: roles name some for machines only."""
    if kind == "plain":
        return sorted({*MACHINE, *PLAIN})
    found = set(MACHINE)
    for path in checkout.glob("roles/*/vars/main.yml"):
        for key, value in (yaml.safe_load(path.read_text()) or {}).items():
            if key.endswith(image.MACHINE_ONLY):
                found.update(value)
    return sorted(found)


def definition(checkout: Path, kind: str) -> str:
    """Return what names the boxes that ``checkout`` defines: no other ones have it."""
    ground = image.PLAIN if kind == "plain" else image.path_of(checkout).name
    parts = [ground, *packages(checkout, kind), MACHINE_OF_ITS_OWN, OVF, str(GIB)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def catalogue(kind: str, version: str, described: str, boxes: Mapping[str, Path], server: str) -> dict[str, object]:
    """Return the catalogue of boxes that Vagrant reads.

    Args:
        kind: of the boxes, of KINDS.
        version: of the boxes, three numbers.
        described: what the boxes were made from.
        boxes: each provider's file.
        server: URL of the directory that has the files.
    """
    providers = []
    for provider, path in boxes.items():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        url = f"{server.rstrip('/')}/{path.name}"
        providers.append({"name": provider, "url": url, "checksum_type": "sha256", "checksum": digest})
    return {
        "name": f"pilotbed/{kind}", "description": f"A node of pilotbed, {described}",
        "versions": [{"version": version, "providers": providers}],
    }  # fmt: skip


def build(kind: str, server: str) -> Path:
    """Make the boxes, if those of this definition are not there, and the catalogue; return the catalogue's path.

    Args:
        kind: of KINDS.
        server: URL of the directory from which Vagrant will fetch them.

    Raises:
        LabError: there is no such kind, the root file system cannot be made, or a tool failed.
    """
    if kind not in KINDS:
        raise LabError(f"BOX={kind}: there are {' and '.join(KINDS)}")
    BOXES.mkdir(parents=True, exist_ok=True)
    catalogued, described = BOXES / f"pilotbed-{kind}.json", definition(CHECKOUT, kind)
    known = json.loads(catalogued.read_text()) if catalogued.exists() else {}
    version = known["versions"][0]["version"] if str(known.get("description", "")).endswith(described) else ""
    boxes = {provider: _path(kind, version, provider) for provider in ("libvirt", "virtualbox")}
    if not version or not all(path.exists() for path in boxes.values()):
        now = datetime.datetime.now(datetime.UTC)
        version = f"13.{now:%Y%m%d}.{now.hour * 60 + now.minute}"
        for old in BOXES.glob(f"pilotbed-{kind}-*.box"):
            old.unlink()
        with tempfile.TemporaryDirectory(dir=BOXES) as scratch:
            boxes = _boxes(Path(scratch), kind, version)
    catalogued.write_text(json.dumps(catalogue(kind, version, described, boxes, server), indent=2) + "\n")
    return catalogued


def apt_server() -> str:
    """Return HOST:PORT of what answers apt's requests on this host: its proxy, or the mirror itself.

    Raises:
        LabError: the mirror is not asked by plain HTTP, which is all that a request can be relayed in.
    """
    url = urllib.parse.urlsplit(os.environ.get("http_proxy") or image.next_source().split()[0])
    if url.scheme != "http" or not url.hostname:
        raise LabError(f"{url.scheme}: the apt source is not of http://, so that no relay can ask it for a machine")
    return f"{url.hostname}:{url.port or 80}"


def _path(kind: str, version: str, provider: str) -> Path:
    return BOXES / f"pilotbed-{kind}-{version}-{provider}.box"


def _boxes(scratch: Path, kind: str, version: str) -> dict[str, Path]:
    root, disk = scratch / "root", scratch / "disk.raw"
    image.bootstrap(
        CHECKOUT, root, CHECKOUT / "var/log/box.log", packages(CHECKOUT, kind), MACHINE_OF_ITS_OWN, kind == "plain"
    )
    print("  root file system made", flush=True)
    _disk(root, disk)
    made = {}
    for provider, convert, files in (
        ("libvirt", ("qcow2", "box.img", "-c", "-W"), {
            "metadata.json": json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": GIB}),
        }),
        ("virtualbox", ("vmdk", "box.vmdk", "-o", "subformat=streamOptimized"), {
            "metadata.json": json.dumps({"provider": "virtualbox"}),
            "Vagrantfile": 'Vagrant.configure("2") { |config| config.vm.base_mac = "0800270070BD" }\n',
            "box.ovf": OVF.format(bytes=GIB << 30),
        }),
    ):  # fmt: skip
        inside = scratch / provider
        inside.mkdir()
        form, name, *options = convert
        _run("qemu-img", "convert", "-O", form, *options, str(disk), str(inside / name))
        for file, text in files.items():
            (inside / file).write_text(text)
        made[provider] = _path(kind, version, provider)
        # What is large is compressed already.
        _run("tar", "--create", "--use-compress-program=gzip -1", f"--file={made[provider]}", f"--directory={inside}",
             *sorted(path.name for path in inside.iterdir()))  # fmt: skip
        print(f"  {made[provider].name}: {made[provider].stat().st_size >> 20} MiB", flush=True)
    return made


def _disk(root: Path, disk: Path) -> None:
    """Make a disk that boots, of a root file system: GRUB's two parts lie where a BIOS looks for them."""
    with disk.open("wb") as file:
        file.truncate(GIB << 30)
    # Features that GRUB does not know ("unknown filesystem") are new defaults of newer e2fsprogs.
    _run("mke2fs", "-q", "-t", "ext4", "-L", "pilotbed", "-O", "^metadata_csum_seed,^orphan_file", "-E",
         f"offset={FIRST}", "-d", str(root), str(disk), f"{(GIB << 20) - FIRST // 1024}k")  # fmt: skip
    # The table of partitions: one that boots, of Linux; where it begins and how long it is in sectors.
    beyond = b"\xfe\xff\xff"  # what cylinders, heads and sectors cannot count
    table = struct.pack("<B3sB3sII", 0x80, beyond, 0x83, beyond, FIRST // 512, ((GIB << 30) - FIRST) // 512)
    loader, core = ((root / "boot" / name).read_bytes() for name in ("boot.img", "core.img"))
    if len(core) > FIRST - 512:
        raise LabError(f"GRUB's core is {len(core)} bytes, and there are {FIRST - 512} before the partition")
    with disk.open("r+b") as file:
        file.write(loader[:440] + b"grid\0\0" + table.ljust(64, b"\0") + b"\x55\xaa" + core)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


if __name__ == "__main__":
    started = time.monotonic()
    try:
        if sys.argv[1:] == ["apt-server"]:
            print(apt_server())
        else:
            where = build(os.environ.get("BOX") or "node", os.environ.get("BOX_SERVER") or BOXES.as_uri())
            print(f"{where}: {time.monotonic() - started:.0f} s")
    except LabError as error:
        sys.exit(f"pilotbed: {error}")
