"""HTCondor by platform: a pilot fetches the one tarball that fits its node, and says so where there is none."""

import io
import os
import tarfile

import pytest
from pilotbed.glidein.builder import StageError, platform_files
from stagebed import STANDARD, last

TELLS = """#!/bin/bash
glidein_config=$1
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$1")"
echo "took $(cat "$(gconfig_get CONDOR_DIR)/which")"
"""


def tarball(directory, name):
    path = directory / f"{name}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("which")
        member.size = len(name)
        archive.addfile(member, io.BytesIO(name.encode()))
    return str(path)


@pytest.fixture
def pilot(site, tmp_path):
    """Run a pilot on a node with that os-release; return what it said."""
    rest = tarball(tmp_path, "rest")
    tables = [
        {"file": tarball(tmp_path, "debian"), "os": "debian13", "arch": os.uname().machine},
        {"file": tarball(tmp_path, "arm"), "os": "*", "arch": "aarch64"},
        {"file": tarball(tmp_path, "rhel"), "os": "rhel9", "arch": "*"},
    ]

    def run(release, others="none", **parameters):
        files = platform_files(rest if others == "rest" else "none", tables)
        site.put("factory", *STANDARD, *files, **last(TELLS))
        (tmp_path / "os-release").write_text(release)
        site.asked.clear()
        return site.pilot(environment={"OS_RELEASE": str(tmp_path / "os-release")}, parameters=parameters)

    return run


@pytest.mark.parametrize(("release", "parameters", "taken"), [
    ('ID=debian\nVERSION_ID="13"\n', {}, "debian"), ('ID=debian\nVERSION_ID="13.2"\n', {"CONDOR_OS": "auto"}, "debian"),
    ('ID="rocky"\nVERSION_ID="9.4"\nID_LIKE="rhel centos fedora"\n', {}, "rhel"),
    ("ID=rhel\nVERSION_ID=9\n", {"CONDOR_OS": "default"}, "rhel"), ("ID=gentoo\n", {"CONDOR_OS": "rhel9"}, "rhel"),
    ("ID=gentoo\n", {"CONDOR_ARCH": "aarch64"}, "arm"),
])  # fmt: skip
def test_the_first_that_fits_is_fetched_alone(pilot, site, release, parameters, taken):
    done = pilot(release, **parameters)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"took {taken}\n" in done.stdout
    assert len([path for path in site.asked if ".tar" in path]) == 1


def test_what_fits_nothing_gets_the_rest_or_is_told(pilot):
    assert "took rest\n" in pilot("ID=debian\nVERSION_ID=12\n", "rest").stdout
    machine = os.uname().machine
    for release, system in (("ID=debian\nVERSION_ID=12\n", "debian12"), ("", "an unknown system")):
        done = pilot(release)
        assert done.returncode == 1
        assert f"the factory has no HTCondor for {system}" in done.stderr
        assert f"it has debian13 on {machine}, * on aarch64, rhel9 on *" in done.stderr


@pytest.mark.parametrize(("table", "why"), [
    ({"file": "/x", "os": "debian13"}, r"tarballs\[0\]: arch is missing"),
    ({"file": "/nonexistent", "os": "*", "arch": "*"}, r"tarballs\[0\]: .*nonexistent"),
    ({"file": "/x", "os": "debian 13", "arch": "*"}, "os 'debian 13' is not a word"),
    ({"file": "/x", "os": 13, "arch": "*"}, "os 13 is not a word"),
    ({"file": "/x", "os": "*", "arch": "*", "version": "25"}, "unknown key version"), ("x", "is not a table"),
])  # fmt: skip
def test_a_table_that_is_wrong_is_named(table, why):
    with pytest.raises(StageError, match=why):
        platform_files("none", [table])
