"""`make status`: what it says of jobs that wait for nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from pilotbed_lab import status

LEFT_OUT = [
    {"jobs": 2, "example": "5.0 (bob)", "why": "larger than any pilot at alpha: RequestMemory 9000 > 2000 MB"},
    {"jobs": 1, "example": "9.0 (mallory)", "why": 'RequestCpus is "four", not a number'},
]


@pytest.mark.parametrize(
    ("state", "lines"),
    [
        (
            json.dumps({"left_out": LEFT_OUT}),
            [
                "jobs for which no pilot is asked (how many, such as, why)",
                "  2  5.0 (bob)  larger than any pilot at alpha: RequestMemory 9000 > 2000 MB",
                '  1  9.0 (mallory)  RequestCpus is "four", not a number',
            ],
        ),
        (json.dumps({"left_out": []}), []),
        ("", []),  # the frontend has not had a turn yet
    ],
)
def test_jobs_for_which_no_pilot_is_asked_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, lines: list[str]
) -> None:
    monkeypatch.setattr(status.local, "running", lambda: ["frontend"])
    monkeypatch.setattr(status.topology, "load", lambda: SimpleNamespace(nodes=[]))
    monkeypatch.setattr(status, "members", lambda group: ["frontend"] if group == "frontend" else [])
    monkeypatch.setattr(status, "host", lambda _: SimpleNamespace(run=lambda _: SimpleNamespace(stdout=state)))
    status.show()
    assert [line for line in capsys.readouterr().out.splitlines()[1:] if line] == lines
