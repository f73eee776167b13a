"""What users do daily, each as an ordinary user on the submit host: DAGs, arrays, files, spooling, their own tools.

    alice@submit ── condor_submit, condor_submit_dag ──▶ schedd ──▶ pilots          refused there: what could never run
    alice@submit ── condor_status, condor_userprio ──▶ collector, negotiator        by her proxy, with nothing else set

What runs is submitted at once, and looked at afterwards.
"""

import re
import time
from contextlib import contextmanager

import pytest
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

#: The directory in a user's home where all this happens.
PLACE = "users-test"
SUBMIT = """executable = payload.sh
arguments = $(Process)
output = {name}.$(Process).out
error = {name}.$(Process).err
log = {name}.log
use_x509userproxy = true
should_transfer_files = yes
request_memory = 128
+DESIRED_Sites = "{site}"
{extra}
queue {queue}
"""
#: Makes a file from one that it was given; node B of the DAG fails at the first try.
PAYLOAD = """#!/bin/sh
echo "$(id -un) $*"
[ ! -e given.txt ] || tr a-z A-Z < given.txt > made.txt
[ "$1 $2" != "B 0" ] || exit 3
"""
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


def cluster(said):
    """The cluster of what condor_submit -terse has said: "7.0 - 7.49"."""
    return re.search(r"^(\d+)\.\d+ - ", said, re.MULTILINE)[1]


class Desk:
    """A user's place at the submit host."""

    def __init__(self, node, walker, site):
        self.node, self.account, self.site = node, walker.account, site
        self.home = ok(node, "getent passwd %s", walker.account).split(":")[5]
        self.uid = ok(node, "id -u %s", walker.account).strip()
        as_user(node, self.account, f"rm -rf {PLACE}; mkdir {PLACE}")
        self.run(f"voms-proxy-init --quiet --voms {walker.voms}")
        self.put("payload.sh", PAYLOAD, "0755")

    def run(self, command, fails=False):
        """Run a command that must succeed, or fail; return what it said."""
        code, said = as_user(self.node, self.account, f"cd {PLACE} && {command}")
        assert (code != 0) is fails, f"{self.account}: {command}: {said}"
        return said

    def put(self, name, text, mode="0644"):
        write(self.node, f"{self.home}/{PLACE}/{name}", text, self.account, mode)

    def describe(self, name, extra="", queue=""):
        self.put(f"{name}.sub", SUBMIT.format(name=name, site=self.site.name, extra=extra, queue=queue))

    def submit(self, name, extra="", queue="", options=""):
        """Submit a cluster; return its number."""
        self.describe(name, extra, queue)
        return cluster(self.run(f"condor_submit -terse {options} {name}.sub"))

    def asked(self, cluster, *attributes):
        """What queue and history say of the cluster's jobs."""
        tools = (f"{tool} {cluster} -af {' '.join(attributes)}" for tool in ("condor_q", "condor_history"))
        return self.run("; ".join(tools)).splitlines()

    def wait(self, cluster, jobs=1, status="4", deadline=240):
        """Wait until all jobs of a cluster have ended."""
        until(f"{jobs} jobs of cluster {cluster} end",
              lambda: self.asked(cluster, "JobStatus").count(status) == jobs, deadline, every=1)  # fmt: skip

    def close(self):
        as_user(self.node, self.account, f"condor_rm -all; rm -rf {PLACE}")


@pytest.fixture(scope="module")
def desk(submit, alice, filtered_site, pilots):
    pilots(filtered_site, 2)
    made = Desk(submit, alice, filtered_site)
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


# -- a user's own tools --------------------------------------------------------------------------------------------


@contextmanager
def by_ssh(desk):
    """How to run a command over ssh, without a login shell."""
    key, mine = "/run/pilotbed-test-key", f"{desk.home}/.ssh"
    try:
        ok(desk.node, "rm -f %s*; ssh-keygen -q -t ed25519 -N '' -f %s", key, key)
        ok(desk.node, "install -d -m 0700 -o %s %s && install -m 0600 -o %s %s %s",
           desk.account, mine, desk.account, f"{key}.pub", f"{mine}/authorized_keys")  # fmt: skip
        yield (
            f"ssh -n -i {key} -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
            f"-o LogLevel=ERROR {desk.account}@localhost -- "
        )
    finally:
        desk.node.run("rm -rf %s* %s", key, mine)


TOOLS = {
    "condor_status": r"slot1@glidein_",
    "condor_userprio -allusers": r"alice@",
    "condor_q -better-analyze {job}": r"of [1-9]\d* slots on",
    "condor_history -limit 1": r"payload.sh",
}


@pytest.fixture(scope="module")
def hopeless(desk):
    """A job that fits no slot, for the analysis."""
    return desk.submit("hopeless", 'requirements = TARGET.GLIDEIN_Site == "nowhere"')


@pytest.fixture(params=["login", "ssh", "nothing set"])
def way(request, desk):
    """How the user's command is run."""
    if request.param == "login":
        yield f"runuser --login {desk.account} --command "
    elif request.param == "nothing set":
        yield f"cd / && runuser -u {desk.account} -- env -i PATH=/usr/bin sh -c "
    else:
        with by_ssh(desk) as way:
            yield way


def test_users_tools_take_the_users_proxy(desk, work, hopeless, way):
    desk.wait(work["items"], 3)
    for tool, shown in TOOLS.items():
        said = ok(desk.node, way + "%s", tool.format(job=hopeless))
        assert re.search(shown, said, re.IGNORECASE), said


@pytest.fixture
def proxy(desk):
    """The path of the user's proxy, which is put back at the end."""
    path = f"/tmp/x509up_u{desk.uid}"
    ok(desk.node, "cp -p %s %s", path, "/run/pilotbed-test-proxy")
    yield path
    ok(desk.node, "mv %s %s", "/run/pilotbed-test-proxy", path)


@pytest.mark.parametrize("tool", ["condor_status", "condor_userprio", "condor_q -better-analyze {job}"])
def test_a_tool_without_a_proxy_says_so(desk, hopeless, proxy, tool):
    ok(desk.node, "rm %s", proxy)
    said = desk.run(tool.format(job=hopeless), fails=True)
    assert f"no proxy in {proxy}" in said
    assert "voms-proxy-init" in said


def test_a_tool_with_a_broken_proxy_says_so(desk, proxy):
    ok(desk.node, "echo nothing > %s", proxy)
    assert f"the proxy in {proxy} has expired" in desk.run("condor_status", fails=True)


def test_a_tool_that_needs_no_proxy_is_silent(desk, proxy):
    ok(desk.node, "rm %s", proxy)
    assert "proxy" not in desk.run("condor_q -totals && condor_history -limit 1")


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
        until("the schedd asks for nothing", lambda: not as_user(desk.node, desk.account, BARE)[0], 20)
        for number, line in enumerate(NEVER):
            refusable(f"never{number}", line)
            taken.append(cluster(desk.run(f"condor_submit -terse never{number}.sub")))
    finally:
        ok(desk.node, "rm -f %s && condor_reconfig", path)
    until("the schedd asks again", lambda: as_user(desk.node, desk.account, BARE)[0], 20)
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
def starts(submit, central, alice, bob, desk, filtered_site):
    """When jobs started, in seconds after bob's submission, while alice had all slots: {account: [...]}, by claims.

    "ours" is the pool; "HTCondor's" a pilot whose claims last as long as HTCondor has it, for the control.
    """
    other = Desk(submit, bob, filtered_site)
    options = with_parameters(arguments(filtered_site), CLAIM_WORKLIFE="1200")
    with HandPilot(worker_with_a_pilot(filtered_site), options) as pilot:
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
        while time.time() < begun + 60 and not shared(found["ours"]):
            time.sleep(1)
            found = look()
        yield found
    other.close()


def shared(found):
    """Whether both have a share: bob has got slots of alice's again and again, and she has got one since his first."""
    alice, bob = found["alice"], found["bob"]
    return len(bob) >= 4 and alice[-1] > bob[0]


def test_two_users_have_their_share_within_a_minute(starts):
    assert shared(starts["ours"]), starts


def test_without_an_end_of_claims_who_came_first_keeps_them(starts):
    """The control."""
    found = starts["HTCondor's"]
    assert found["bob"] == []
    assert found["alice"][-1] > 0
