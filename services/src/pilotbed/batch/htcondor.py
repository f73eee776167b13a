"""HTCondor: a site's own pool, as batch system. The users' pool, whose daemons are the pilots', is none."""

from . import moment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: The site's pool's configuration, where there is one.
CONFIG = "/etc/condor-site/condor_config"
#: What an ad's JobStatus means once the job is in the history.
_STATES = {"3": "REMOVED", "4": "COMPLETED"}


def job(title: str) -> str:
    """Return the job of a starter of the site's pool (``condor_starter -f … -a 6.0 -slot-name … HOST``).

    With STARTER_LOG_NAME_APPEND = JobId the startd says it there. A pilot's own starters name a slot there.
    """
    name, *words = title.split("\0")
    if name.rpartition("/")[2] != "condor_starter" or "-a" not in words[:-1]:
        return ""
    number = words[words.index("-a") + 1]
    cluster, _, process = number.partition(".")
    digits = cluster + process
    return number if cluster and process and digits.isascii() and digits.isdigit() and len(digits) < 20 else ""


def recorded(jobs: "Iterable[str]") -> dict[str, dict[str, str]]:
    """Return what the schedd's history says; nothing where there is none."""
    import os
    import subprocess

    command = ["condor_history", "-long", *sorted(jobs)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "CONDOR_CONFIG": CONFIG}
        )
    except OSError:
        return {}
    return parse(done.stdout) if done.returncode == 0 else {}


def parse(text: str) -> dict[str, dict[str, str]]:
    """Return the jobs by id in a history file, or in what condor_history -long has printed.

    A job is lines of ``NAME = VALUE``; a line that begins with ``***``, or an empty one, ends it. A string of a user's
    stays on its own line, within quotes.
    """
    jobs: dict[str, dict[str, str]] = {}
    said: dict[str, str] = {}
    for line in [*text.split("\n"), ""]:
        if line.strip() and not line.startswith("***"):
            name, equals, value = line.partition(" = ")
            if equals:
                said[name] = value.strip().strip('"')
            continue
        number = f"{said.get('ClusterId', '')}.{said.get('ProcId', '')}"
        if job(f"condor_starter\0-a\0{number}\0"):
            jobs[number] = {
                "user": said.get("Owner", ""), "state": _STATES.get(said.get("JobStatus", ""), ""),
                "start": moment(said.get("JobCurrentStartDate", "")),
                "end": moment(said.get("EnteredCurrentStatus", "")),
                "nodes": said.get("LastRemoteHost", "").rpartition("@")[2].partition(".")[0],
                "cpu": _sum(said.get("RemoteUserCpu", ""), said.get("RemoteSysCpu", "")),
            }  # fmt: skip
        said = {}
    return jobs


def _sum(*seconds: str) -> str:
    """Return the sum of times in seconds; "" where one is no number."""
    try:
        return f"{sum(map(float, seconds)):.1f}"
    except ValueError:
        return ""
