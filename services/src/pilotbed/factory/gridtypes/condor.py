"""HTCondor-CE: a schedd of HTCondor's, found by its collector."""

import re

from ..states import State
from . import GridType

RECORD = GridType(
    gatekeeper=re.compile(r"[A-Za-z0-9.@_-]+ [A-Za-z0-9.-]+(:[0-9]+)?"),
    example="ce ce:9619",
    resource="condor {gatekeeper}",
    # The other schedd's word for the job (JobStatus).
    states={
        "IDLE": State.PENDING,
        "RUNNING": State.RUNNING,
        "SUSPENDED": State.RUNNING,
        "TRANSFERRING_OUTPUT": State.STAGE_OUT,
        "COMPLETED": State.STAGE_OUT,
    },
)
