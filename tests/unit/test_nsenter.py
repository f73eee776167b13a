"""What the connection plugin puts before modules: the node keeps what Python has compiled from a zip file."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pilotbed_suite import CHECKOUT

MODULE = b"#!/usr/bin/python3\nfrom __future__ import annotations\nimport sys\nsys.path.insert(0, %r)\nimport told\n"


@pytest.fixture
def run(tmp_path: Path):
    """Run a module of a zip file whose ``told`` says something; return what was printed."""
    spec = importlib.util.spec_from_file_location("nsenter", CHECKOUT / "plugins/connection/nsenter.py")
    assert spec and spec.loader
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    assert b"/var/cache/ansible-compiled" in plugin.KEEPS_COMPILED
    code = plugin.KEEPS_COMPILED.replace(b"/var/cache/ansible-compiled", str(tmp_path / "kept").encode())

    def said(source: str) -> str:
        with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
            archive.writestr("told.py", source)
        module = MODULE % str(tmp_path / "code.zip")
        done = subprocess.run([sys.executable], input=code % module, capture_output=True, check=True)
        return done.stdout.decode()

    return said


def test_what_was_compiled_is_used_again_and_belongs_to_its_source(run, tmp_path: Path) -> None:
    assert run("print('one')") == "one\n"
    [one] = (tmp_path / "kept").iterdir()
    assert run("print('another')") == "another\n"
    [other] = set((tmp_path / "kept").iterdir()) - {one}
    other.rename(one)
    assert run("print('one')") == "another\n", "control: it was compiled anew"


@pytest.mark.parametrize("content", [b"", b"\xe3", b"nonsense", b"\xdb\xff\xff\xff\x7f"])
def test_a_damaged_file_is_compiled_anew(run, tmp_path: Path, content: bytes) -> None:
    run("print('one')")
    [one] = (tmp_path / "kept").iterdir()
    whole = one.read_bytes()
    one.write_bytes(content)
    assert run("print('one')") == "one\n"
    assert one.read_bytes() == whole
    one.write_bytes(whole[:-9])
    assert run("print('one')") == "one\n"


def test_where_nothing_can_be_kept_it_runs(run, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("no directory")
    assert run("print('one')") == "one\n"
