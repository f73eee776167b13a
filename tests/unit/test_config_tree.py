"""The node side of config_tree, on a directory instead of a node; systemd's part is tested on the grid."""

from __future__ import annotations

import base64
import grp
import importlib.util
import json
import os
import pwd
import stat
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "plugins/modules/config_tree.py"


def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("config_tree", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


config_tree = load()
OWNER = pwd.getpwuid(os.geteuid()).pw_name
GROUP = grp.getgrgid(os.getegid()).gr_name
SECRET = "correct horse battery staple"


def entry(content: str | None, mode: str = "0644", **others: str) -> dict[str, Any]:
    encoded = None if content is None else base64.b64encode(content.encode()).decode()
    return {"content": encoded, "owner": OWNER, "group": GROUP, "mode": mode, **others}


def apply(files: dict[Path, dict[str, Any]], check: bool = False, diff: bool = False) -> dict[str, Any]:
    """Return the result of installing ``files``; it must fit into JSON, which is how it leaves the node."""
    wanted = {"files": {str(path): value for path, value in files.items()}, "units": [], "restart": False}
    result: dict[str, Any] = config_tree.Tree({**wanted, "check": check, "diff": diff}).apply()
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


def test_a_service_hands_on_more_of_the_package_than_its_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_tree, "PACKAGE", tmp_path)
    for name in ("a.py", "glidein/startup.sh", "__pycache__/a.cpython-313.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert {path.name for path in config_tree._package()} == {"a.py", "startup.sh"}


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
    wanted = {"files": {str(tmp_path / "file/a"): entry("1\n")}, "units": [], "restart": False}
    config_tree.main({**wanted, "check": False, "diff": False})
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] is True
    assert "file" in result["msg"]
