"""Question 8: nobody submits in another's name."""

import shlex

import pytest
from pilotbed_suite.support import as_user, ok

SUBMIT = """universe = vanilla
executable = /bin/true
log = other.log
should_transfer_files = yes
{line}
queue
"""


def submitted(submit, alice, line):
    """Have alice submit a job with a line more, on hold; return code, what was said, and whose the job is."""
    text = SUBMIT.format(line=f"hold = true\n{line}")
    script = f"voms-proxy-init --quiet --voms {alice.voms} && printf %s {shlex.quote(text)} > other.sub"
    as_user(submit, alice.account, script)
    code, said = as_user(submit, alice.account, "condor_submit -terse other.sub; code=$?; rm -f other.sub; exit $code")
    owner = ""
    if code == 0:
        job = said.split()[-1]
        owner = ok(submit, "condor_q %s -af Owner User AcctGroupUser AccountingGroup", job).strip()
        as_user(submit, alice.account, f"condor_rm {job}")
    return code, said, owner


@pytest.mark.check("D8.3")
@pytest.mark.parametrize("line", [
    '+Owner = "{bob}"', "accounting_group_user = {bob}", "accounting_group = x\naccounting_group_user = {bob}",
    '+AccountingGroup = "{bob}"', '+AcctGroupUser = "{bob}"',
])  # fmt: skip
def test_a_job_in_anothers_name_is_refused(submit, alice, bob, line):
    code, said, owner = submitted(submit, alice, f"use_x509userproxy = true\n{line.format(bob=bob.account)}")
    assert code != 0 or bob.account not in owner, f"it is {owner}: {said}"


@pytest.mark.check("D8.3")
@pytest.mark.parametrize("attribute", ["AccountingGroup", "AcctGroupUser", "Owner"])
def test_a_job_is_not_given_to_another_later(submit, jobs, any_site, alice, bob, attribute):
    job = jobs.submit(alice, any_site, extra="hold = true")
    as_user(submit, alice.account, f"condor_qedit {job.id} {attribute} '\"{bob.account}\"'")
    assert bob.account not in ok(submit, "condor_q %s -af Owner User AcctGroupUser AccountingGroup", job.id)


@pytest.mark.check("D8.3", control=True)
@pytest.mark.parametrize("group", ["", "accounting_group = x"])
def test_a_job_in_ones_own_name_is_taken(submit, alice, group):
    code, said, owner = submitted(submit, alice, f"use_x509userproxy = true\n{group}")
    assert code == 0, said
    assert owner.startswith(f"{alice.account} ")
