"""Slurm."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: What `recorded` asks sacct for, besides the job's id.
_SACCT = {"User": "user", "State": "state", "Start": "start", "End": "end", "NodeList": "nodes", "TotalCPU": "cpu"}


def job(title: str) -> str:
    """Return the job of a step's process (``slurmstepd: [6.batch]``)."""
    name, _, rest = title.partition(": [")
    number = rest.partition(".")[0]
    return number if name == "slurmstepd" and number.isascii() and number.isdigit() and len(number) < 10 else ""


def recorded(jobs: "Iterable[str]") -> dict[str, dict[str, str]]:
    """Return what sacct says; nothing where it is not installed, or slurmdbd does not run."""
    import shutil
    import subprocess

    if not shutil.which("sacct"):
        return {}
    command = ["sacct", "--parsable2", "--noheader", "--allocations", f"--format={','.join(['JobIDRaw', *_SACCT])}",
               f"--jobs={','.join(sorted(jobs))}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return parse_sacct(done.stdout) if done.returncode == 0 else {}


def parse_sacct(text: str) -> dict[str, dict[str, str]]:
    """Return the jobs by id in what sacct has printed for `recorded`."""
    rows = (line.split("|") for line in text.splitlines())
    return {row[0]: dict(zip(_SACCT.values(), row[1:], strict=True)) for row in rows if len(row) == len(_SACCT) + 1}


def parse(text: str) -> dict[str, dict[str, str]]:
    """Return the jobs by id in the text of a job completion file (JobCompType=jobcomp/filetxt), a job a line.

    Only fields are taken whose values have no spaces.
    """
    import re

    keys = {"UserId": "user", "JobState": "state", "StartTime": "start", "EndTime": "end", "NodeList": "nodes"}
    jobs: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        # A job's name stands between the ids and the rest and is the user's: it must not pass for another field.
        head, _, rest = line.partition(" Name=")
        tail = rest[rest.rfind(" JobState=") :]
        said = dict(re.findall(r"(\w+)=(\S*)", f"{head} {tail}"))
        if "JobId" in said:
            jobs[said["JobId"]] = {name: said.get(key, "") for key, name in keys.items()}
            jobs[said["JobId"]]["user"] = jobs[said["JobId"]]["user"].partition("(")[0]
    return jobs
