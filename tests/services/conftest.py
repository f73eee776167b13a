import pytest
from relaybed import Bed, Target, echo


@pytest.fixture
def bed(tmp_path):
    made = Bed(tmp_path)
    yield made
    made.close()


@pytest.fixture
def served(bed):
    """A relay, an agent, and an echo service behind it."""
    bed.start_relay()
    bed.start_agent(Target(echo))
    bed.registered()
    return bed
