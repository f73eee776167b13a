"""A tool whose output is cut off by its reader ends quietly; one whose connection breaks does not."""

import subprocess
import sys

import pytest

PRINTS = "print('line\\n' * 100_000); return 3"
CONNECTS = "raise BrokenPipeError('a connection')"


@pytest.mark.parametrize(
    ("does", "reader", "code", "said"),
    [
        (PRINTS, "head -n 1", 141, ""),
        (PRINTS, "cat > /dev/null", 3, ""),
        (CONNECTS, "cat > /dev/null", 1, "BrokenPipeError: a connection"),
    ],
)
def test_run(does: str, reader: str, code: int, said: str) -> None:
    program = f"from pilotbed.tool import run\ndef main():\n    {does}\nrun(main)"
    pipe = f'"$@" | {reader} > /dev/null; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["/bin/bash", "-c", pipe, "bash", sys.executable, "-c", program],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (code, [said] if said else [])
