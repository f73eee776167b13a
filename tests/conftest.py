"""Its place puts tests/ on the path, for what several suites share (`import pki`)."""

import signal

import pytest
from hypothesis import settings

# An example that took 0.05 s takes 0.3 s beside other parts of the suite: "Unreliable test timings".
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


def pytest_configure():
    """Told to stop, end as after Ctrl-C: what fixtures have made is taken down."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("told to stop", signal.SIGTERM + 128))
