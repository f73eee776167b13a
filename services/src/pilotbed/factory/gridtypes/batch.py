"""GRAM's gatekeeper, by a GAHP of our own behind HTCondor's grid type for batch systems (``pilotbed.factory.gram``)."""

import re

from ..states import State
from . import GridType

RECORD = GridType(
    gatekeeper=re.compile(r"[A-Za-z0-9.-]+:[0-9]+/jobmanager-[a-z0-9_-]+"),
    example="ce:2119/jobmanager-batch",
    resource="batch gram",
    # REMOTE_X reaches the GAHP as X: a further word of the resource would have HTCondor look for a host to log in to.
    submit={"batch_queue": "{queue}", "MY.REMOTE_GramResource": '"{gatekeeper}"'},
    # HTCondor's own words for what the GAHP has said.
    states={"IDLE": State.PENDING, "RUNNING": State.RUNNING, "COMPLETED": State.STAGE_OUT},
    takes_files=False,  # all of a job is its request, which a job manager keeps as arguments
)
