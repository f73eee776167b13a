"""Ansible's modules on a local node: forked by a process that has loaded what they share, each one's run by itself."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from pilotbed_lab import forkserver
from pilotbed_suite import CHECKOUT

SPEC = importlib.util.spec_from_file_location("nsenter", CHECKOUT / "plugins/connection/nsenter.py")
assert SPEC and SPEC.loader
PLUGIN = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PLUGIN)


class Host(PLUGIN.Connection):
    """This host instead of a node: everything but nsenter."""

    def __init__(self, door: Path) -> None:
        self._door = door

    def _command(self, argv):
        return [sys.executable if word.endswith("/python3") else word for word in argv]

    def run(self, code: str):
        return self._forked(code.encode())


#: A checkout may be anywhere: more than the 107 bytes that a socket's name has.
LONG = "a-checkout" * 12


@pytest.fixture
def host(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(PLUGIN, "IDLE", 600)
    kept = PLUGIN.FORKSERVER.replace(forkserver.COMPILED.encode(), str(tmp_path / "kept").encode())
    monkeypatch.setattr(PLUGIN, "FORKSERVER", kept)
    made = Host(tmp_path / LONG / "door")
    made._door.parent.mkdir()
    yield made
    if said := made.run(f"import os; {SERVER}; print(server)"):
        os.kill(int(said[1]), signal.SIGKILL)


#: Of a module: the process that forked the one that waits for it.
SERVER = "server = int(open(f'/proc/{os.getppid()}/stat').read().split()[3])"


@pytest.mark.parametrize(
    ("module", "code", "out", "err"),
    [
        ("print('said')", 0, "said\n", ""),
        ("import sys; print('said'); sys.exit(3)", 3, "said\n", ""),
        ("import sys; sys.exit()", 0, "", ""),
        ("import sys; sys.exit('why')", 1, "", "why\n"),
        ("import sys; print(sys.stdin.read(), sys.argv, __name__)", 0, " [''] __main__\n", ""),
        ("import os, sys; print('lost'); sys.stdout.flush(); os.kill(os.getpid(), 9)", -9, "lost\n", ""),
        ("import atexit; atexit.register(print, 'at the end'); print('first')", 0, "first\nat the end\n", ""),
        ("import threading, time, sys\nthreading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()\n"
         "sys.exit(2)", 2, "late\n", ""),
    ],
)  # fmt: skip
def test_a_module_ends_as_it_would_by_itself(host, module, code, out, err) -> None:
    assert host.run(module) == (code, out.encode(), err.encode())
    alone = subprocess.run([sys.executable], input=module.replace("__name__", "'__main__'").encode(),
                           capture_output=True, check=False)  # fmt: skip
    assert (alone.returncode, alone.stderr) == (code, err.encode()), "control"


def test_what_a_module_raises_is_told(host) -> None:
    code, out, err = host.run("1 / 0")
    assert (code, out) == (1, b"")
    assert err.splitlines()[-1] == b"ZeroDivisionError: division by zero"


def test_nothing_of_a_module_stays(host) -> None:
    look = "import os, builtins; print(os.getcwd(), os.environ.get('LEFT'), hasattr(builtins, 'left'), os.umask(2))"
    before = host.run(look)
    assert before[0] == 0
    left = "import os, builtins; os.chdir('/tmp'); os.environ['LEFT'] = '1'; builtins.left = 1; os.umask(0o77)"
    assert host.run(f"{left}; {look}")[1] != before[1], "control"
    assert host.run(look) == before


def test_modules_do_not_share_their_random_numbers(host) -> None:
    one = "import random, tempfile, uuid; print(random.random(), next(tempfile._get_candidate_names()), uuid.uuid4())"
    assert not set(host.run(one)[1].split()) & set(host.run(one)[1].split())


def test_modules_share_what_is_loaded_and_have_what_is_theirs(host, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        for name in ("ansible/__init__.py", "ansible/modules/__init__.py", "ansible/module_utils/__init__.py"):
            archive.writestr(name, "")
        archive.writestr("ansible/modules/own.py", "said = 'its own'")
    code, out, err = host.run(
        f"import sys; shared = set(sys.modules); sys.path.insert(0, {str(tmp_path / 'code.zip')!r})\n"
        "import ansible.module_utils.basic, ansible.module_utils.facts.timeout, ansible.modules.own\n"
        "print(ansible.modules.own.said, ansible.modules.own.__file__)\n"
        "print('ansible.module_utils.basic' in shared, 'ansible.module_utils.facts.timeout' in shared)\n"
    )
    assert (code, out.decode(), err) == (0, f"its own {tmp_path}/code.zip/ansible/modules/own.py\nTrue False\n", b"")
    assert list((tmp_path / "kept").iterdir()), "what has been compiled is kept"


def test_what_a_module_leaves_running_holds_nobody_up(host) -> None:
    began = time.monotonic()
    code, out, _ = host.run("import subprocess; print(subprocess.Popen(['sleep', '600']).pid)")
    os.kill(int(out), signal.SIGKILL)
    assert (code, time.monotonic() - began < 300) == (0, True)


def test_another_one_is_started_when_it_has_ended_or_was_killed(host, monkeypatch) -> None:
    look = f"import os; {SERVER}; print(server)"
    first, again = host.run(look), host.run(look)
    assert first == again, "control: one serves all"
    os.kill(int(first[1]), signal.SIGKILL)
    monkeypatch.setattr(PLUGIN, "IDLE", 1)
    second = host.run(look)
    assert (second[0], second[1] != first[1]) == (0, True)
    end = time.monotonic() + 60
    while Path("/proc", second[1].decode().strip(), "cmdline").read_text():  # this process is not asked how it ended
        assert time.monotonic() < end, "it waits for more than its second"
        time.sleep(0.1)
    third = host.run(look)
    assert (third[0], third[1] != second[1]) == (0, True)


def test_one_that_dies_under_its_module_says_so(host) -> None:
    code, _, _ = host.run("import os, time; os.kill(os.getppid(), 9); time.sleep(1)")
    assert code == -9


@pytest.mark.parametrize("argv", [["/bin/false"], ["/nowhere/python"]])
def test_where_none_can_be_started_a_module_runs_by_itself(host, monkeypatch, argv) -> None:
    monkeypatch.setattr(host, "_command", lambda _: argv)
    assert host.run("print('ran')") is None


def test_only_root_may_send_modules(host) -> None:
    host.run("pass")
    assert host._door.stat().st_mode & 0o777 == 0o600


# -- what is compiled is kept --------------------------------------------------------------------------------------


def compiled(source: str, directory: Path) -> object:
    found: dict[str, object] = {}
    exec(forkserver.compiled("told", source.encode(), str(directory)), found)
    return found["told"]


def test_what_was_compiled_is_used_again_and_belongs_to_its_source(tmp_path: Path) -> None:
    assert compiled("told = 1", tmp_path) == 1
    [one] = tmp_path.iterdir()
    assert compiled("told = 2", tmp_path) == 2
    [other] = set(tmp_path.iterdir()) - {one}
    other.rename(one)
    assert compiled("told = 1", tmp_path) == 2, "control: it was compiled anew"


@pytest.mark.parametrize("content", [b"", b"\xe3", b"nonsense", b"\xdb\xff\xff\xff\x7f"])
def test_a_damaged_file_is_compiled_anew(tmp_path: Path, content: bytes) -> None:
    compiled("told = 1", tmp_path)
    [one] = tmp_path.iterdir()
    whole = one.read_bytes()
    for damaged in (content, whole[:-9]):
        one.write_bytes(damaged)
        assert compiled("told = 1", tmp_path) == 1
        assert one.read_bytes() == whole


def test_where_nothing_can_be_kept_it_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("no directory")
    assert compiled("told = 1", tmp_path / "kept") == 1
