#!/usr/bin/python3 -I
"""gridengine_status.py JOB...: tells blahpd how a job is (gridengine/DATE/NUMBER), a line each: 0[ad], or 1ERROR: why.

While the master does not answer a job goes on for all that is known. One that the master knows no more is over when its
end is in the accounting, which is a moment later.
"""

import re
import subprocess
import sys
import time

#: JobStatus of HTCondor.
IDLE, RUNNING, COMPLETED = 1, 2, 4
#: Seconds after its end until a job's record is written; one that is deleted before it starts has none.
PATIENCE = 5
#: Seconds that a command of Grid Engine's may take.
DEADLINE = 15
#: The exit code of a job that has none.
UNKNOWN = 255


def ask(*command):
    """Return what a command prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DEADLINE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def queued(number, said):
    """Return a job's JobStatus by what qstat has printed; None if it is not there."""
    found = re.search(rf"(?m)^ *{number} +\S+ +\S+ +\S+ +(\w+) ", said)
    # All others run, are suspended, or are about to be one of these.
    return (IDLE if "q" in found[1] else RUNNING) if found else None


def exit_code(said):
    """Return the exit code in what qacct has printed of a job; None if there is none. The last run counts."""
    found = re.findall(r"(?m)^exit_status +(\d+)", said or "")
    return int(found[-1]) if found else None


def status(number):
    """Return JobStatus and exit code of a job."""
    said = ask("qstat", "-u", "*")
    if said is None:
        return RUNNING, None
    if state := queued(number, said):
        return state, None
    end = time.monotonic() + PATIENCE
    while (code := exit_code(ask("qacct", "-j", number))) is None and time.monotonic() < end:
        time.sleep(0.5)
    return COMPLETED, UNKNOWN if code is None else code


def main(words):
    """Answer for each job; return the exit code."""
    for job in (word for word in words if not word.startswith("-")):
        number = job.rpartition("/")[2]
        if not re.fullmatch("[0-9]{1,10}", number):
            print(f"1ERROR: {job[:40]!r} is no job of Grid Engine")
            continue
        state, code = status(number)
        ad = f'BatchJobId="{number}"; JobStatus={state};' + (f" ExitCode={code};" if code is not None else "")
        print(f"0[{ad}]", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
