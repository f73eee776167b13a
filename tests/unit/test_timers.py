"""What a timer starts: systemd starts it with each daemon-reload, too, where the timer's first moment has passed."""

from pathlib import Path

import pytest
from pilotbed_suite import CHECKOUT

TIMERS = sorted(path for path in CHECKOUT.glob("roles/*/*/**/*.timer*") if path.is_file())


@pytest.mark.parametrize("timer", TIMERS, ids=lambda path: path.name)
def test_a_deployment_with_many_reloads_does_not_have_it_refused(timer: Path) -> None:
    """Seen as "Start request repeated too quickly", and a unit that has failed until its next turn."""
    name = timer.name.removesuffix(".j2").replace(".timer", ".service")
    [service] = [path for path in timer.parent.iterdir() if path.name.removesuffix(".j2") == name]
    assert "\nStartLimitIntervalSec=0\n" in service.read_text()
