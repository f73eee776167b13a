from functools import partial

import pytest
from relaybed import Bed, Target, echo
from stagebed import STANDARD, Handler, Site, last, note, serve


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


@pytest.fixture
def site(tmp_path):
    """A factory with an entry and a frontend with a group, whose scripts tell that they ran."""
    root, worker, asked = tmp_path / "www", tmp_path / "worker", list[str]()
    worker.mkdir()
    server = serve(partial(Handler, directory=str(root), asked=asked))
    found = Site(root, f"http://127.0.0.1:{server.server_port}", asked, worker)
    found.put("factory", *STANDARD, note("first.sh"), note("after.sh", "after_file_list"), **last())
    found.put("factory/entry_alpha", note("entry.sh"))
    found.put("frontend", note("early.sh", "preentry_file_list"), note("client.sh"))
    found.put("frontend/group_main", note("group.sh"))
    yield found
    server.shutdown()
    server.server_close()
