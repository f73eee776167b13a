"""ARC's computing element, A-REX, by its REST interface."""

import re

from ..arex import renew
from ..states import State
from . import GridType

RECORD = GridType(
    gatekeeper=re.compile(r"https://[A-Za-z0-9.:/_-]+"),
    example="https://ce:443/arex/rest/1.0",
    resource="arc {gatekeeper}",
    submit={"arc_resources": "<QueueName>{queue}</QueueName>"},
    # Words of the REST interface, and those that begin with INLRMS of the batch system behind it.
    states={
        **dict.fromkeys(("ACCEPTING", "ACCEPTED", "PREPARING", "PREPARED", "SUBMITTING"), State.STAGE_IN),
        **dict.fromkeys(("QUEUING", "INLRMS:Q"), State.PENDING),
        **dict.fromkeys(("RUNNING", "INLRMS:R", "EXITING"), State.RUNNING),
        **dict.fromkeys(("FINISHING", "FINISHED"), State.STAGE_OUT),
    },
    renew=renew,
)
