"""What the lab asks of its host before it changes anything."""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pilotbed_lab import LabError, preflight

Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def good_host(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A host that has all; returns the commands that were run on it."""
    ran: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(argv)
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(preflight, "_has_overlayfs", lambda _: True)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * preflight.DISK, 0, preflight.DISK))
    return ran


def test_a_good_host_is_taken(good_host: list[list[str]]) -> None:
    preflight.check()
    # The question about nftables is asked in a network namespace of its own.
    assert [argv[:2] for argv in good_host] == [["unshare", "--net"]]


def test_who_is_not_root_is_refused(good_host: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="run it as root"):
        preflight.check()
    assert good_host == []


def test_a_kernel_without_overlayfs_is_refused(good_host: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_has_overlayfs", lambda _: False)
    with pytest.raises(LabError, match=r"no overlayfs.*modprobe overlay"):
        preflight.check()


def test_a_kernel_without_nftables_is_refused(good_host: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Unable to initialize Netlink socket: Protocol not supported"
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 1, "", said))
    with pytest.raises(LabError, match=rf"no nftables.*modprobe nf_tables.*{said}"):
        preflight.check()


def test_a_full_disk(good_host: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * preflight.DISK, 0, preflight.DISK - 1))
    with pytest.raises(LabError, match=r"GiB free, the lab needs 4: make room"):
        preflight.check()


@pytest.mark.parametrize(
    ("kernel", "known"),
    [("nodev\tproc\nnodev\toverlay\n\text4\n", True), ("nodev\tproc\n\text4\n", False), ("nodev\toverlayish\n", False)],
)
def test_overlayfs_is_looked_up_by_its_whole_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, known: bool
) -> None:
    filesystems = tmp_path / "filesystems"
    filesystems.write_text(kernel)
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 1, "", ""))
    assert preflight._has_overlayfs(filesystems) is known


def test_overlayfs_is_loaded_where_it_is_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystems = tmp_path / "filesystems"
    filesystems.write_text("\text4\n")

    def modprobe(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert (argv[0], argv[-1]) == ("modprobe", "overlay")
        filesystems.write_text("\text4\nnodev\toverlay\n")
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(subprocess, "run", modprobe)
    assert preflight._has_overlayfs(filesystems)
