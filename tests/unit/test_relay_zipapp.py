"""The relay's agent as one file, as pilots get it."""

import re
import subprocess
import sys
from pathlib import Path

import pilotbed
from pilotbed.relay.zipapp import MODULES, agent_zipapp

SOURCE = Path(pilotbed.__path__[0])


def test_agent_zipapp_runs_with_the_standard_library_alone(tmp_path: Path) -> None:
    agent = tmp_path / "relay_agent.pyz"
    agent.write_bytes(agent_zipapp())
    done = subprocess.run(["python3", "-I", "-S", agent, "--help"], capture_output=True, text=True, check=True)
    assert {"--server", "--proxy", "--cadir", "--state", "--pilot"} <= set(re.findall(r"--\w+", done.stdout))


def test_agent_zipapp_is_reproducible() -> None:
    assert agent_zipapp() == agent_zipapp()


def test_agent_zipapp_holds_what_the_agent_imports_and_nothing_else() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pilotbed.relay.agent;"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'pilotbed'), sep='\\n')"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(SOURCE.parent)]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(imported) == sorted(module.__file__ for module in MODULES)
