"""Pilots start and end at once: the validation script must let a good worker pass, and alice's job must have run."""

from collections.abc import Iterator

from pilotbed_suite import inventory
from pilotbed_training import examine

#: The script may be mended or taken out.
ALLOWED = (
    ("frontend", "file /etc/pilotbed/frontend-stage.toml"),
    ("frontend", "file /etc/pilotbed/check_software.sh"),
    ("frontend", "file /var/lib/pilotbed/frontend/stage/*"),
)
STAGE = "/var/lib/pilotbed/frontend/stage"
#: A pilot's configuration for the script, on a worker: the functions that it takes from the pilot.
TRY = r"""
d=$(mktemp -d) && cd $d && trap 'rm -rf $d' EXIT
printf %s "$1" > script
echo 'script_ok() { exit 0; }; script_error() { echo "$2"; exit 1; }' > functions
echo "ADD_CONFIG_LINE_SOURCE $d/functions" > config
bash script "$d/config" main
"""


def scripts_pass() -> Iterator[str]:
    """Every worker passes what its pilots are told to check."""
    frontend = examine.service("frontend")
    group = inventory.load().variable("grid_vos")[0]["frontend_group"]
    listed = examine.said(
        frontend,
        f"cd {STAGE}/group_{group} && grep -h check_software $(ls -t *file_list*.lst | head -n 4) | head -n 1",
    )
    staged = next((word for word in listed.split() if word.startswith("check_software.") and word.count(".") > 1), "")
    if not staged:
        return
    script = examine.said(frontend, f"cat {STAGE}/group_{group}/{staged}")
    for name in inventory.load().names("worker"):
        done = examine.host(name).run("bash -c %s bash %s", TRY, script)
        if done.rc:
            yield f"on {name} check_software.sh ends each pilot: {(done.stdout or done.stderr).strip()}"


def jobs_have_run() -> Iterator[str]:
    """Alice's job has run, through a pilot that was started since."""
    yield from examine.called_jobs_end_well("lesson-10", 1)


CHECKS = (scripts_pass,)
JOBS = (jobs_have_run,)
