"""The factory's stage area: an entry says once what its ad shows and what its pilots are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pilotbed.factory import area
from pilotbed.factory.config import Config, Entry
from pilotbed.settings import load

TOML = """
factory = "factory"
glidein = "v1"
collector = "factory:9618"
manifest = "MANIFEST"
[stage]
web = "http://factory.grid.test/stage"
condor = "none"
[stage.attributes]
GLIDEIN_Failure_Delay = 10
GLIDEIN_Entry_Start = {expr = "RequestMemory < 2000"}
[frontends.vo]
identity = "frontend@grid.test"
classes = ["pilot"]
[entries.plain]
gridtype = "arc"
gatekeeper = "https://ce:443/arex/rest/1.0"
queue = "grid"
[entries.relayed]
gridtype = "arc"
gatekeeper = "https://ce:443/arex/rest/1.0"
queue = "grid"
traversal = "relay,ccb_tunnel"
relays = ["relay1:9700", "relay2:9700"]
ccb_broker = "border:9618"
glexec = "auto"
max_walltime = 7200
[entries.relayed.attributes]
GLIDEIN_Site = "alpha"
"""


def write(directory: Path, text: str = TOML) -> Path:
    path = directory / "factory.toml"
    path.write_text(text.replace("MANIFEST", str(directory / "out/manifest.json")))
    return path


def constants(directory: Path, part: str) -> dict[str, str]:
    """Return what the pilots of an area are told."""
    (path,) = (directory / "out" / part).glob("constants.*")
    return dict(line.split("\t", 1) for line in path.read_text().splitlines())


def test_pilots_are_told_what_the_entry_says(tmp_path: Path) -> None:
    assert area.main(["--config", str(write(tmp_path))]) == 0
    assert constants(tmp_path, "") == {"GLIDEIN_Failure_Delay": "10", "GLIDEIN_Entry_Start": "RequestMemory < 2000"}
    assert constants(tmp_path, "entry_relayed") == {
        "GLIDEIN_Site": "alpha", "GLIDEIN_Max_Walltime": "7200", "GLIDEIN_Job_Max_Time": "3600",
        "GLIDEIN_Traversal": "relay,ccb_tunnel", "GLIDEIN_Relay_Server": "relay1:9700 relay2:9700",
        "GLIDEIN_CCB_Broker": "border:9618", "GLEXEC_BIN": "auto", "GLIDEIN_MaxMemMBs": "1000",
    }  # fmt: skip
    assert constants(tmp_path, "entry_plain") == {
        "GLIDEIN_Max_Walltime": "86400", "GLIDEIN_Job_Max_Time": "43200", "GLIDEIN_Traversal": "direct",
        "GLEXEC_BIN": "NONE", "GLIDEIN_MaxMemMBs": "1000",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert set(manifest["entries"]) == {"plain", "relayed"}


def test_ad_and_pilots_never_differ(tmp_path: Path) -> None:
    changed = TOML.replace('GLIDEIN_Site = "alpha"', 'GLIDEIN_CPUS = 8\nGLIDEIN_Traversal = "direct"')
    for entry in load(write(tmp_path, changed), Config).entries.values():
        published, staged = entry.published(), entry.staged({})
        assert set(staged) - set(published) == {"GLIDEIN_Job_Max_Time"}
        assert {name: published[name] for name in staged if name in published} == {
            name: value for name, value in staged.items() if name in published
        }


@pytest.mark.parametrize(
    ("common", "own", "told"),
    [({}, {}, 3600), ({"GLIDEIN_Job_Max_Time": 60}, {}, None), ({}, {"GLIDEIN_Job_Max_Time": 90}, 90)],
)
def test_the_longest_job_is_a_default_only(common: dict[str, Any], own: dict[str, int], told: int | None) -> None:
    entry = Entry("arc", "https://ce:443/arex/rest/1.0", "grid", max_walltime=7200, attributes=own)
    assert entry.staged(common).get("GLIDEIN_Job_Max_Time") == told


def test_a_second_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(write(tmp_path))]
    assert area.main(arguments) == 0
    assert "changed: " in capsys.readouterr().out
    assert area.main(arguments) == 0
    assert capsys.readouterr().out == "unchanged\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('web = "http://factory.grid.test/stage"', "", "key stage.web is missing"),
        ('condor = "none"', 'condro = "none"', "unknown key stage.condro"),
        ("GLIDEIN_Failure_Delay = 10", "GLIDEIN_Failure_Delay = 1.5", "attribute GLIDEIN_Failure_Delay: 1.5"),
        ('condor = "none"', 'condor = "none"\nkeep_days = -1', "keep_days: -1.0 is not a number of days"),
        ("[entries.relayed.attributes]", '[[entries.relayed.files]]\nname = "x"', "entries.relayed.files"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    assert old in TOML
    path = write(tmp_path, TOML.replace(old, new, 1))
    assert area.main(["--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"pilotbed-factory-stage: {path}: " in error
    assert message in error
    assert not (tmp_path / "out").exists()
