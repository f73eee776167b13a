"""The mapfile of HTCondor's computing element: a pilot with its VO's role has an account, and nobody else."""

import re

import pytest
from pilotbed.mapping.htcondor import line

PILOT, FQAN = "/DC=test/DC=grid/O=Grid+lab/OU=Services/CN=pilot (1)", "/gridlab/Role=pilot"


def matches(identity):
    method, pattern, account = re.fullmatch(r"(\w+) /(.*)/ (\w+)\n", line(PILOT, FQAN, "pilot001")).groups()
    assert (method, account) == ("SSL", "pilot001")
    assert re.search(r"(?<!\\)/", pattern) is None, "a slash would end it"
    return re.search(pattern.replace(r"\/", "/"), identity) is not None


@pytest.mark.parametrize("more", ["", "/Capability=NULL", ",/gridlab/Role=NULL", "/Capability=NULL,/gridlab/Role=NULL"])
def test_a_pilot_with_its_role_is_known(more):
    assert matches(f"{PILOT},{FQAN}{more}")


@pytest.mark.parametrize("identity", [
    PILOT,
    f"{PILOT},/gridlab/Role=NULL/Capability=NULL",
    f"{PILOT},/gridlab/Role=NULL/Capability=NULL,{FQAN}",  # not the primary one
    f"{PILOT},{FQAN}s",
    f"{PILOT},/gridlab/x{FQAN}",
    f"{PILOT},/cosmo/Role=pilot",
    f"{PILOT}/CN=proxy,{FQAN}",
    f"/DC=other{PILOT},{FQAN}",
    f"{PILOT.replace('.', 'x').replace('+', '')},{FQAN}",
    f"{PILOT.replace(' (1)', ' 1')},{FQAN}",
])  # fmt: skip
def test_nobody_else_is(identity):
    assert not matches(identity)
