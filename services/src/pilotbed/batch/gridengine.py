"""Grid Engine."""

from . import moment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: The master's file of records, on its own host.
ACCOUNTING = "/var/lib/gridengine/default/common/accounting"
#: Where accounting(5) has what, in a line of so many fields (8.1.9).
_FIELDS = 45
_HOSTNAME, _OWNER, _JOB, _START, _END, _FAILED, _EXIT, _CPU = 1, 3, 5, 9, 10, 11, 12, 36


def job(title: str) -> str:
    """Return the job of a shepherd (``sge_shepherd-6 -bg``)."""
    name, _, rest = title.partition("-")
    number = rest.replace("\0", " ").partition(" ")[0]
    return number if name == "sge_shepherd" and number.isascii() and number.isdigit() and len(number) < 10 else ""


def recorded(jobs: "Iterable[str]") -> dict[str, dict[str, str]]:
    """Return what the master's file says; nothing on any other host."""
    try:
        with open(ACCOUNTING, errors="replace") as file:
            found = parse(file.read())
    except OSError:
        return {}
    wanted = set(jobs)
    return {number: record for number, record in found.items() if number in wanted}


def parse(text: str) -> dict[str, dict[str, str]]:
    """Return the jobs by id in the text of an accounting file, a job a line, fields between colons.

    Names that users choose have no colon: Grid Engine refuses those. A line with another number of fields is left out.
    """
    jobs: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        said = line.split(":")
        if len(said) != _FIELDS or not said[_JOB].isdigit():
            continue
        failed, code = said[_FAILED].partition(" ")[0], said[_EXIT]
        jobs[said[_JOB]] = {
            "user": said[_OWNER], "state": f"exit {code}" if failed == "0" else f"failed {failed}",
            "start": moment(said[_START]), "end": moment(said[_END]), "nodes": said[_HOSTNAME].partition(".")[0],
            "cpu": said[_CPU],
        }  # fmt: skip
    return jobs
