"""What users do daily, each as an ordinary user on the submit host: DAGs, arrays, files, spooling, fair share.

    alice@submit ── condor_submit, condor_submit_dag ──▶ schedd ──▶ pilots          refused there: what could never run

What runs is submitted at once, and looked at afterwards.
"""

import re
import time

import pytest
from desk import PLACE, Desk, cluster
from pilotbed_suite.support import (
    GRID,
    HandPilot,
    arguments,
    as_user,
    ok,
    until,
    with_parameters,
    worker_with_a_pilot,
    write,
)

DAG = """JOB A node.sub
JOB B node.sub
JOB C node.sub
VARS ALL_NODES retry="$(RETRY)"
PARENT A CHILD B
PARENT B CHILD C
RETRY B 2
"""
#: A job without a proxy.
BARE = "cd / && condor_submit -terse executable=/bin/true hold=true -queue 1"
#: A proxy below the credential of the arguments that ends so many seconds from now, on stdout.
MAKE_PROXY = """
import datetime, sys
sys.path.insert(0, "/usr/lib/pilotbed")
from pilotbed.x509 import load_pem, make_proxy
issuer, lifetime = load_pem(*sys.argv[2:]), datetime.timedelta(seconds=int(sys.argv[1]))
sys.stdout.write(make_proxy(issuer, lifetime).pem().decode())
"""


@pytest.fixture(scope="module")
def desk(submit, alice, any_site, pilots):
    pilots(any_site, 2)
    made = Desk(submit, alice, any_site)
    yield made
    made.close()


@pytest.fixture(scope="module")
def work(desk):
    """What is to run, submitted: cluster by name."""
    desk.run("mkdir below && echo given > below/given.txt && printf 'one\\ntwo\\nthree\\n' > items")
    desk.put("dag", DAG)
    desk.describe("node", "output = $(JOB).out\narguments = $(JOB) $(retry)\npriority = 10")
    files = (
        "initialdir = below\ntransfer_input_files = given.txt\ntransfer_output_files = made.txt\n"
        'transfer_output_remaps = "made.txt = kept.txt"'
    )
    return {
        "dag": re.search(r"submitted to cluster (\d+)", desk.run("condor_submit_dag dag"))[1],
        "held": desk.submit("held", "hold = true"),
        # Late materialisation: as many as may wait, so that not everything is asked for what two pilots do.
        "array": desk.submit("array", "max_idle = 6", "50"),
        "files": desk.submit("files", files),
        "spooled": desk.submit("spooled", options="-spool"),
        "items": desk.submit("items", "arguments = $(item)", "item from items"),
    }


# -- DAGs, arrays, files -------------------------------------------------------------------------------------------


def test_jobs_are_held_released_and_removed(desk, work):
    assert desk.asked(work["held"], "HoldReasonCode") == ["15"]
    desk.run(f"condor_release {work['held']}")
    desk.wait(work["held"])
    other = desk.submit("other", "hold = true")
    desk.run(f"condor_release {other} && condor_hold {other} && condor_rm {other}")
    desk.wait(other, status="3")
    assert re.findall(r"^(\d+) \(", desk.run("cat other.log"), re.MULTILINE)[-1] == "009", "its log ends with that"


def test_an_array_of_fifty(desk, work):
    desk.wait(work["array"], 50)
    found = [desk.run(f"cat array.{number}.out").split() for number in range(50)]
    assert [number for _, number in found] == [str(number) for number in range(50)]
    assert len({account for account, _ in found}) == 1
    assert found[0][0] != desk.account


def test_files_go_to_the_job_and_come_back_by_relative_paths(desk, work):
    desk.wait(work["files"])
    assert desk.run("cat below/kept.txt") == "GIVEN\n"


def test_spooled_jobs_output_is_fetched(desk, work):
    desk.wait(work["spooled"])
    assert "No such file" in desk.run("cat spooled.0.out", fails=True)
    desk.run(f"condor_transfer_data {work['spooled']}")
    assert desk.run("cat spooled.0.out").endswith(" 0\n")


def test_items_of_a_file_are_queued(desk, work):
    desk.wait(work["items"], 3)
    assert [desk.run(f"cat items.{number}.out").split()[1] for number in range(3)] == ["one", "two", "three"]


def test_a_dag_of_three_nodes_with_a_retry(desk, work):
    desk.wait(work["dag"])
    assert desk.asked(work["dag"], "ExitCode") == ["0"], desk.run("cat dag.dagman.out")
    nodes = desk.run(f"condor_history -constraint 'DAGManJobId == {work['dag']}' -af DAGNodeName ExitCode").splitlines()
    assert nodes[::-1] == ["A 0", "B 3", "B 0", "C 0"]
    assert desk.run("cat B.out").endswith("B 1\n")


def test_the_daemons_logs_are_closed_to_users(desk, work):
    """ShadowLog has the secrets of claims; DAGMan, which would change into that directory, does without."""
    desk.wait(work["array"], 50)
    assert ok(desk.node, "grep -c ACCEPTED /var/log/condor/ShadowLog").strip() != "0"
    assert "Permission denied" in desk.run("cat /var/log/condor/ShadowLog", fails=True)


# -- what could never run ------------------------------------------------------------------------------------------

#: Two that would run, but not as their users meant it.
OUTPUT, COMMAND = "output = https://{web}/out", '+PreCmd = "payload.sh"'
#: What the submit file says beside SUBMIT, and what its user reads.
NEVER = {
    "use_x509userproxy = false": "this one has none: voms-proxy-init",
    "x509userproxy = plain.pem": "is of no VO",
    "transfer_input_files = http://{web}/index.html": "no pilot has transfer plug-ins",
    "transfer_input_files = payload.sh, file:///etc/hostname": "no pilot has transfer plug-ins",
    'transfer_output_remaps = "made.txt = https://{web}/"': "no pilot has transfer plug-ins",
    OUTPUT: "no pilot has transfer plug-ins",
    "transfer_plugins = test=payload.sh": "leave transfer_plugins",
    COMMAND: "leave transfer_plugins, PreCmd",
    "transfer_output_files = /etc/hostname": "no path from the root",
    "transfer_output_files = ../made.txt": "no ..",
    "output_destination = http://{web}/": "no output_destination",
    "should_transfer_files = no": "take should_transfer_files = yes",
    '+RequestCpus = "four"': "are numbers, not strings",
    "universe = docker\ndocker_image = debian": "no pilot has containers",
    "universe = container\ncontainer_image = image.sif": "no pilot has containers",
    "universe = parallel\nmachine_count = 1": "jobs of universe 11",
    "universe = grid\ngrid_resource = arc https://{web}/": "jobs of universe 9",
}


@pytest.fixture(scope="module")
def refusable(desk):
    """A function that describes one of NEVER as NAME.sub."""
    desk.run("voms-proxy-init --quiet --out plain.pem")
    web = GRID.fqdn(GRID.names("factory")[0])
    return lambda name, line, more="": desk.describe(name, f"{line.format(web=web)}\n{more}")


@pytest.mark.parametrize("line", NEVER)
def test_job_that_could_never_run_is_refused_with_reason_and_remedy(desk, refusable, line):
    refusable("never", line)
    said = desk.run("condor_submit never.sub", fails=True)
    assert NEVER[line] in said
    assert "Failed to commit job submission" in said


def test_expired_proxy_is_refused_by_the_schedd_too(desk, refusable):
    """condor_submit looks at what the submit file names; what gets past that is the schedd's to refuse."""
    write(desk.node, "/run/pilotbed-test-proxy.py", MAKE_PROXY, mode="0644")
    own = "~/.globus/usercert.pem ~/.globus/userkey.pem"
    desk.run(f"(umask 077; python3 -I /run/pilotbed-test-proxy.py -60 {own} > expired.pem)")
    refusable("never", f'use_x509userproxy = false\n+x509userproxy = "{desk.home}/{PLACE}/expired.pem"')
    assert "expired.pem has expired: voms-proxy-init" in desk.run("condor_submit never.sub", fails=True)


def test_the_same_jobs_are_taken_where_nothing_refuses_them_and_do_not_run(desk, refusable):
    """The control: it is the schedd that refuses, and none of these jobs would have run."""
    taken, path = [], "/etc/condor/config.d/99-pilotbed-test.conf"
    try:
        # Not an edited file: HTCondor would read the copy that is kept beside it, too.
        write(desk.node, path, "SUBMIT_REQUIREMENT_NAMES = Nothing\nSUBMIT_REQUIREMENT_Nothing = true\n", mode="0644")
        ok(desk.node, "condor_reconfig")
        until("the schedd asks for nothing", lambda: not as_user(desk.node, desk.account, BARE)[0])
        for number, line in enumerate(NEVER):
            refusable(f"never{number}", line)
            taken.append(cluster(desk.run(f"condor_submit -terse never{number}.sub")))
    finally:
        ok(desk.node, "rm -f %s && condor_reconfig", path)
    until("the schedd asks again", lambda: as_user(desk.node, desk.account, BARE)[0])
    job = dict(zip(NEVER, taken, strict=True))
    # Two that run, so that the others were looked at meanwhile: a good one, and one that runs without its command.
    desk.wait(desk.submit("good", "request_memory = 129"))
    desk.wait(job[COMMAND])
    started = {line for line in job if desk.asked(job[line], "NumJobStarts") != ["0"]}
    desk.run(f"condor_rm {' '.join(job.values())}; true")
    assert started - {OUTPUT} == {COMMAND}, "that one's output is not brought back"


# -- fair share ----------------------------------------------------------------------------------------------------

SHORT = "max_idle = 4\nexecutable = /bin/sleep\ntransfer_executable = false\narguments = 2"


@pytest.fixture(scope="module")
def starts(submit, central, alice, bob, desk, any_site):
    """When jobs started, in seconds after bob's submission, while alice had all slots: {account: [...]}, by claims.

    "ours" is the pool; "HTCondor's" a pilot whose claims last as long as HTCondor has it, for the control.
    """
    other = Desk(submit, bob, any_site)
    options = with_parameters(arguments(any_site), CLAIM_WORKLIFE="1200")
    with HandPilot(worker_with_a_pilot(any_site), options) as pilot:
        until("the control's pilot is there", pilot.slots)
        places = {
            "ours": (f'requirements = split(TARGET.Name, "@")[1] != "{pilot.name}"\n+DESIRED_Sites = undefined', "200"),
            "HTCondor's": (f'requirements = split(TARGET.Name, "@")[1] == "{pilot.name}"', "50"),
        }
        made = {}
        for who in (desk, other):
            ok(central, "condor_userprio -setprio %s 10", f"{who.account}@{GRID.variable('grid_domain')}")
            for claims, (where, count) in places.items():
                made[claims, who.account] = who.submit(f"share{count}", f"{SHORT}\n{where}", count)
            if who is desk:
                first = [made[claims, who.account] for claims in places]
                until("alice has slots", lambda: all("2" in desk.asked(number, "JobStatus") for number in first))  # noqa: B023
        begun = time.time()

        def look():
            found = {}
            for (claims, account), number in made.items():
                tools = f"condor_q {number} -af JobStartDate; condor_history {number} -af JobStartDate"
                times = (float(start) - begun for start in ok(submit, tools).split() if start != "undefined")
                found.setdefault(claims, {})[account] = sorted(times)
            return found

        found = look()
        while time.time() < begun + 300 and not shared(found["ours"]):
            time.sleep(1)
            found = look()
        yield found
    other.close()


def shared(found):
    """Whether both have a share: bob has got slots of alice's again and again, and she has got one since his first.

    Not how soon: on a machine with ten other things to do, bob's fourth came after more than a minute.
    """
    alice, bob = found["alice"], found["bob"]
    return len(bob) >= 4 and alice[-1] > bob[0]


def test_two_users_have_their_share(starts):
    assert shared(starts["ours"]), f"{starts}"


def test_without_an_end_of_claims_who_came_first_keeps_them(starts):
    """The control."""
    found = starts["HTCondor's"]
    assert found["bob"] == []
    assert found["alice"][-1] > 0
