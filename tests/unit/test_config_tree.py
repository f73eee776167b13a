"""The node side of config_tree, on a directory instead of a node; systemd's part is tested on the grid."""

from __future__ import annotations

import base64
import functools
import grp
import importlib.util
import json
import os
import pwd
import re
import stat
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pilotbed_suite import CHECKOUT


def load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("config_tree", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


config_tree = load(CHECKOUT / "plugins/modules/config_tree.py")
OWNER = pwd.getpwuid(os.geteuid()).pw_name
GROUP = grp.getgrgid(os.getegid()).gr_name
SECRET = "correct horse battery staple"


def entry(content: str | None, mode: str = "0644", **others: str) -> dict[str, Any]:
    encoded = None if content is None else base64.b64encode(content.encode()).decode()
    return {"content": encoded, "owner": OWNER, "group": GROUP, "mode": mode, **others}


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What tasks have made for items."""
    path = tmp_path / "record/of-items.json"
    monkeypatch.setattr(config_tree, "RECORD", path)
    return path


def apply(files: dict[Path, dict[str, Any]], check: bool = False, diff: bool = False, **others: Any) -> dict[str, Any]:
    """Return the result of installing ``files``; it must fit into JSON, which is how it leaves the node."""
    wanted = {"files": {str(path): value for path, value in files.items()}, "units": [], "restart": False,
              "task": "role: Configure", "of_items": []}  # fmt: skip
    result: dict[str, Any] = config_tree.Tree({**wanted, "check": check, "diff": diff, **others}).apply()
    return dict(json.loads(json.dumps(result)))


def mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


def test_a_new_file_comes_with_its_directories_and_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "etc/service/main.conf"
    result = apply({path: entry("port = 1\n", mode="0640")})
    assert (result["changed"], result["files"], result["units"]) == (True, [str(path)], [])
    assert path.read_text() == "port = 1\n"
    assert mode(path) == "0640"
    assert [found.name for found in path.parent.iterdir()] == ["main.conf"]


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    files = {tmp_path / "a": entry("1\n"), tmp_path / "b": entry("2\n", mode="0600"), tmp_path / "c": entry(None)}
    apply(files)
    before = (tmp_path / "a").stat()
    result = apply(files, diff=True)
    assert (result["changed"], result["files"], result["diff"]) == (False, [], [])
    assert (tmp_path / "a").stat() == before


def test_of_a_tree_only_what_differs_is_written(tmp_path: Path) -> None:
    apply({tmp_path / "a": entry("1\n"), tmp_path / "b": entry("2\n")})
    kept = (tmp_path / "a").stat().st_ino
    result = apply({tmp_path / "a": entry("1\n"), tmp_path / "b": entry("3\n")})
    assert result["files"] == [str(tmp_path / "b")]
    assert (tmp_path / "b").read_text() == "3\n"
    assert (tmp_path / "a").stat().st_ino == kept


def test_a_reader_keeps_the_old_file(tmp_path: Path) -> None:
    """A file is replaced, not rewritten: who has it open never sees half of it."""
    path = tmp_path / "a"
    apply({path: entry("old\n")})
    with path.open() as reader:
        apply({path: entry("new\n")})
        assert reader.read() == "old\n"
    assert path.read_text() == "new\n"


def test_a_wrong_mode_is_a_change(tmp_path: Path) -> None:
    path = tmp_path / "key"
    apply({path: entry(SECRET, mode="0600")})
    path.chmod(0o644)
    assert apply({path: entry(SECRET, mode="0600")})["files"] == [str(path)]
    assert mode(path) == "0600"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_wrong_owner_is_a_change(tmp_path: Path) -> None:
    path = tmp_path / "a"
    apply({path: entry("1\n")})
    files = {path: entry("1\n", owner="nobody", group="nogroup")}
    assert apply(files)["files"] == [str(path)]
    assert (path.owner(), path.group()) == ("nobody", "nogroup")
    assert not apply(files)["changed"]


def test_what_must_not_exist_is_removed_once(tmp_path: Path) -> None:
    path = tmp_path / "default"
    path.write_text("from the package\n")
    assert apply({path: entry(None)})["files"] == [str(path)]
    assert not path.exists()
    assert not apply({path: entry(None)})["changed"]


# -- items


def of_items(*paths: Path, **others: Any) -> dict[str, Any]:
    return apply({path: entry("x\n") for path in paths}, of_items=[str(path) for path in paths], **others)


def test_what_was_made_for_an_item_goes_with_it(tmp_path: Path) -> None:
    """A VOMS server that the inventory has no more is not believed any longer."""
    first, second, mine = tmp_path / "vo/a.lsc", tmp_path / "vo/b.lsc", tmp_path / "vo/mine.lsc"
    of_items(first, second)
    mine.write_text("by hand\n")
    assert of_items(first, check=True)["files"] == [str(second)]
    assert second.exists()
    result = of_items(first, diff=True)
    assert (result["changed"], result["files"]) == (True, [str(second)])
    assert sorted(path.name for path in first.parent.iterdir()) == ["a.lsc", "mine.lsc"]
    assert not of_items(first)["changed"]
    assert of_items()["files"] == [str(first)]
    assert mine.exists()


def test_another_tasks_items_are_left(tmp_path: Path) -> None:
    of_items(tmp_path / "a", task="one: Configure")
    of_items(tmp_path / "b", task="two: Configure")
    assert of_items(task="two: Configure")["files"] == [str(tmp_path / "b")]
    assert (tmp_path / "a").exists()


def test_a_run_that_was_cut_off_forgets_no_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    of_items(a, b)
    with monkeypatch.context() as cut:
        cut.setattr(config_tree.Tree, "_replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            of_items(a)
    assert not of_items(a)["files"]
    assert [path.exists() for path in (a, b)] == [True, False]


class Systemctl:
    """What systemctl was told, and whether there was the file then; whatever it is asked about is `active` or not."""

    def __init__(self, file: Path) -> None:
        self.said: list[str] = []
        self.file = file
        self.active = False

    def __call__(self, *argv: str) -> subprocess.CompletedProcess[str]:
        if argv[1] == "is-active":
            return subprocess.CompletedProcess(argv, 0 if self.active else 3, "", "")
        self.said.append(f"{' '.join(argv[1:])} {self.file.exists()}")
        known = argv[-1] != "voms@gone.service"
        return subprocess.CompletedProcess(argv, 0 if known else 1, "", "" if known else "Unit does not exist\n")


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemctl:
    told = Systemctl(tmp_path / "a.socket")
    monkeypatch.setattr(config_tree, "UNITS_DIR", f"{tmp_path}/")
    monkeypatch.setattr(config_tree, "_run", told)
    monkeypatch.setattr(config_tree.Tree, "_units", lambda _: [])
    return told


def test_an_instance_of_an_item_that_is_gone_is_stopped(systemctl: Systemctl) -> None:
    of_items(units=["nginx.service", "voms@a.service", "voms@b.service"])
    assert of_items(units=["voms@a.service"], check=True)["units"] == ["voms@b.service"]
    assert systemctl.said == []
    result = of_items(units=["voms@a.service"])
    assert (result["changed"], result["units"]) == (True, ["voms@b.service"])
    assert systemctl.said == ["disable --quiet voms@b.service False", "stop voms@b.service False"]


def test_an_instance_that_is_not_known_any_more_is_forgotten(systemctl: Systemctl) -> None:
    of_items(units=["voms@gone.service"])
    assert of_items()["units"] == ["voms@gone.service"]
    assert not of_items()["changed"]


def test_an_instance_that_runs_on_is_told_and_tried_again(systemctl: Systemctl) -> None:
    of_items(units=["voms@a.service"])
    systemctl.active = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="is not wanted any more, and runs on"):
            of_items()


@pytest.mark.parametrize(("name", "stopped"), [("a.socket", "a.socket"), ("a@.service", "a@*.service")])
def test_a_unit_is_stopped_before_its_file_goes(tmp_path: Path, systemctl: Systemctl, name: str, stopped: str) -> None:
    """Else it runs on, and nobody is told how to stop it."""
    unit, more = tmp_path / name, tmp_path / "a.service.d/more.conf"
    systemctl.file = unit
    apply({unit: entry("[Unit]\n"), more: entry("[Unit]\n")})
    systemctl.said.clear()
    apply({unit: entry(None), more: entry(None)})
    assert systemctl.said == [f"disable --quiet {name} True", f"stop {stopped} True", "daemon-reload False"]


# -- which files of our package a unit is restarted for


def load_action() -> ModuleType:
    return load(CHECKOUT / "plugins/action/config_tree.py")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package like ours."""
    files = {
        "pilotbed/__init__.py": "",
        "pilotbed/settings.py": "import json",
        "pilotbed/x509/__init__.py": "from .names import slash",
        "pilotbed/x509/names.py": "",
        "pilotbed/relay/__init__.py": "",
        "pilotbed/relay/server.py": "from .. import settings\nfrom pilotbed.x509 import slash\nfrom . import protocol",
        "pilotbed/relay/protocol.py": "def later():\n    import pilotbed.pool",
        "pilotbed/relay/agent.py": "import pilotbed.relay.protocol",
        "pilotbed/pool.py": "",
        "pilotbed/glexec/__init__.py": "",
        "pilotbed/glexec/root.py": "from pilotbed import settings",
        "pilotbed/glidein/__init__.py": "",
        "pilotbed/glidein/build.py": "",
        "pilotbed/glidein/startup.sh": "",
        "pilotbed/glidein/files/check.sh": "",
        "pilotbed/glidein/inner/__init__.py": "",
        "pilotbed/glidein/inner/other.sh": "",
        "pilotbed/glidein/__pycache__/build.cpython-313.pyc": "",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_a_program_stands_for_all_that_it_imports(package: Path) -> None:
    imports = load_action().Imports(package)
    script = "#!/usr/bin/python3 -I\nimport sys\nfrom pilotbed.relay.server import main\nsys.exit(main())\n"
    assert imports.closure(imports.of_program(script, "relay")) == [
        f"pilotbed/{name}" for name in (
            "__init__.py", "pool.py", "relay/__init__.py", "relay/protocol.py", "relay/server.py", "settings.py",
            "x509/__init__.py", "x509/names.py",
        )
    ]  # fmt: skip


def test_a_program_that_is_not_python_imports_nothing(package: Path) -> None:
    imports = load_action().Imports(package)
    for script in ("#!/bin/sh\n# says what to import, and: it's done\n", "", "\x7fELF import pilotbed"):
        assert imports.of_program(script, "ready") == set()


def test_a_package_hands_on_its_files_that_are_no_modules(package: Path) -> None:
    assert load_action().Imports(package).closure({"pilotbed.glidein.build"}) == [
        f"pilotbed/{name}" for name in ("__init__.py", "glidein/__init__.py", "glidein/build.py",
                                        "glidein/files/check.sh", "glidein/startup.sh")
    ]  # fmt: skip


#: What runs our package all the time, or is done again when it has changed; with its role.
UNITS = {
    "pilotbed-factory.service": "factory", "pilotbed-frontend@.service": "frontend",
    "pilotbed-frontend-stage.service": "frontend", "pilotbed-relay.service": "relay",
    "pilotbed-border.service": "border", "pilotbed-relay-agent.service": "relay_agent",
    "pilotbed-pilot-log-receiver.service": "factory", "pilotbed-mapping.service": "mapping_service",
    "pilotbed-log-upload.service": "log_upload",
}  # fmt: skip


@functools.cache
def programs(unit: str) -> list[str]:
    """Return the files of our package that a unit is restarted for."""
    path = f"/etc/systemd/system/{unit}"
    template = (CHECKOUT / f"roles/{UNITS[unit]}/templates{path}.j2").read_text()
    files = {path: entry(re.sub(r"{[{%].*?[}%]}", " ", template))}
    found: dict[str, list[str]] = load_action().ActionModule._programs(CHECKOUT / "roles", files, [unit])
    return [path.removeprefix("/usr/lib/pilotbed/pilotbed/") for path in found[unit]]


def test_every_unit_that_runs_our_package_is_known_here() -> None:
    texts = {path: path.read_text() for path in CHECKOUT.glob("roles/*/*/**/systemd/system/pilotbed-*.service*")}
    ours = {
        path.name.removesuffix(".j2") for path, text in texts.items()
        if ("Type=oneshot" not in text or "RemainAfterExit" in text) and "ExecStart=/usr/lib/systemd/" not in text
    }  # fmt: skip
    assert ours == set(UNITS)


@pytest.mark.parametrize(
    ("changed", "restarted"),
    [
        ("glexec/root.py", set()),
        ("relay/server.py", {"relay"}),
        ("factory/receiver.py", {"pilot-log-receiver"}),
        ("relay/agent.py", {"relay-agent", "factory", "frontend-stage"}),  # pilots get it from the stage
        ("mapping/app.py", {"mapping"}),
        ("factory/decisions.py", {"factory"}),
        ("frontend/decisions.py", {"frontend@"}),
        ("glidein/glidein_startup.sh", {"factory", "frontend-stage"}),
    ],
)
def test_a_service_is_restarted_for_what_it_imports_alone(changed: str, restarted: set[str]) -> None:
    units = {f"pilotbed-{name}.service" for name in restarted}
    assert {unit for unit in UNITS if changed in programs(unit)} == units


def test_no_bench_and_no_lab_is_installed() -> None:
    installed = {path.name for path in (CHECKOUT / "services/src/pilotbed").iterdir()}
    assert not {"lab", "bench", "suite"} & installed


@pytest.mark.parametrize("dangling", [False, True])
def test_of_a_symbolic_link_only_the_link_is_removed(tmp_path: Path, dangling: bool) -> None:
    target, link = tmp_path / "available", tmp_path / "enabled"
    if not dangling:
        target.write_text("kept\n")
    link.symlink_to(target)
    assert apply({link: entry(None)}, diff=True)["changed"]
    assert not link.is_symlink()
    assert target.exists() is not dangling


def test_a_symbolic_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere", tmp_path / "a"
    target.write_text("same\n")
    link.symlink_to(target)
    assert apply({link: entry("same\n")})["changed"]
    assert not link.is_symlink()
    assert target.read_text() == "same\n"


def test_the_difference_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "a"
    apply({path: entry("port = 1\n")})
    (shown,) = apply({path: entry("port = 2\n")}, diff=True)["diff"]
    assert "-port = 1\n+port = 2\n" in shown["prepared"]


@pytest.mark.parametrize("access", ["0600", "0640", "0440"])
def test_the_difference_of_a_secret_is_not_shown(tmp_path: Path, access: str) -> None:
    path = tmp_path / "key"
    path.write_text("an older secret")
    result = json.dumps(apply({path: entry(SECRET, mode=access)}, diff=True))
    assert str(path) in result
    assert SECRET not in result
    assert "an older secret" not in result


def test_check_mode_says_what_it_would_do_and_does_not(tmp_path: Path) -> None:
    new, changed, gone = tmp_path / "dir/new", tmp_path / "changed", tmp_path / "gone"
    changed.write_text("1\n")
    gone.write_text("1\n")
    result = apply({new: entry("2\n"), changed: entry("2\n"), gone: entry(None)}, check=True, diff=True)
    assert result["files"] == [str(new), str(changed), str(gone)]
    assert len(result["diff"]) == 3
    assert not new.parent.exists()
    assert (changed.read_text(), gone.read_text()) == ("1\n", "1\n")


def test_an_account_that_is_not_there_is_named(tmp_path: Path) -> None:
    files = {tmp_path / "a": entry("1\n", owner="pilotbed-nobody")}
    with pytest.raises(RuntimeError, match=r"/a: .*pilotbed-nobody.*; make the account in this tree's sysusers\.d"):
        apply(files)
    assert not (tmp_path / "a").exists()
    # In check mode it may be one that this tree would make.
    assert apply(files, check=True)["changed"]


def test_a_failure_leaves_the_node_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way of a directory\n")
    wanted = {"files": {str(tmp_path / "file/a"): entry("1\n")}, "units": [], "restart": False, "task": ""}
    config_tree.main({**wanted, "of_items": [], "check": False, "diff": False})
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] is True
    assert "file" in result["msg"]
