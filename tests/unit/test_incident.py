"""Incidents: what ads and records say, what is on disk when, what is taken back, and what an archive may hold."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.trace.records import Payload, from_json
from pilotbed_suite import GridError
from pilotbed_suite.incident import archive, blocks, cli, found, hunt, nodes, record, who
from pilotbed_suite.incident.nodes import NodeError
from pilotbed_suite.incident.onnode import collect, look
from pilotbed_suite.incident.record import Record, Step
from pilotbed_suite.inventory import Inventory

PEOPLE = "/DC=test/DC=grid/O=Gridlab/OU=People/CN="
ALICE = f"{PEOPLE}Alice Adams"
#: Of condor_q -json, inventory/mini; as alice could once edit it.
AD: dict[str, Any] = {
    "ClusterId": 3, "ProcId": 0, "GlobalJobId": "submit.grid.test#3.0#1795948441", "JobStatus": 2,
    "MachineAttrGLIDEIN_Batch_Job0": None, "MachineAttrGLIDEIN_ClusterId0": 1,
    "MachineAttrGLIDEIN_Entry_Name0": "alpha", "MachineAttrGLIDEIN_Pilot_Account0": "pilot009",
    "MachineAttrGLIDEIN_ProcId0": 1, "MachineAttrGLIDEIN_Relay_Address0": "submit.grid.test:41001",
    "MachineAttrGLIDEIN_Schedd0": "submit.grid.test", "MachineAttrGLIDEIN_Site0": "alpha",
    "MachineAttrGLIDEIN_Traversal0": "relay", "MachineAttrGLIDEIN_Worker0": "wn1.grid.test",
    "Odd": "a\"b\\nc'$(touch /tmp/x)ü", "Owner": "alice", "QDate": 5,
    "RemoteHost": "slot1_1@glidein_1144_414731926@wn1.grid.test", "User": "alice@grid.test",
    "x509userproxy": "/tmp/x509up_u30001",
    "x509UserProxyFirstFQAN": "/gridlab/analysis/Role=NULL/Capability=NULL", "x509userproxysubject": ALICE,
}  # fmt: skip
#: Of pilotbed-trace --json, that job's first run and its second.
RUNS = [
    {"node": "wn1.grid.test", "account": "gl016", "dn": ALICE, "fqan": "/gridlab/analysis/Role=NULL/Capability=NULL",
     "id": "submit.grid.test#3.0#1795948441", "pilot_account": "pilot009",
     "pilot": "/dc=test/dc=grid/o=gridlab/ou=services/cn=pilot", "batch": "htcondor 1.0", "start": 1795948442.567,
     "end": 1795948454.557, "cpu": 0.04, "memory": 23695360, "exit": 143, "ended": "signal 15", "reason": "",
     "job": {}, "condor": {}},
    {"node": "wn1.grid.test", "account": "gl016", "dn": ALICE, "fqan": "/gridlab/analysis/Role=NULL/Capability=NULL",
     "id": "submit.grid.test#3.0#1795948441", "pilot_account": "pilot009", "pilot": "", "batch": "htcondor 2.0",
     "start": 1795948460.674, "end": None, "cpu": 0.0, "memory": 0, "exit": None, "ended": "", "reason": "",
     "job": {}, "condor": {}},
]  # fmt: skip
#: Of the relay's journal, short-unix.
RELAY = """\
1795948413.118 submit pilotbed-relay[1]: INFO event=lease_opened lease=aa port=41001 pilot=glidein_1 dn="/CN=a \\"b" peer=10.70.0.2:1
1795948420.118 submit pilotbed-relay[1]: INFO event=stream stream=7 port=41001 peer=10.70.0.14:13839 end=eof
1795948430.118 submit pilotbed-relay[1]: INFO event=lease_ended why=gone lease=aa port=41001 pilot=glidein_1 dn=/CN=a
1795948431.118 submit pilotbed-relay[1]: INFO event=lease_opened lease=bb port=41001 pilot=glidein_2 dn=/CN=a peer=10.70.0.2:2
1795948432.118 submit pilotbed-relay[1]: INFO event=lease_opened lease=cc port=41002 pilot=glidein_3 dn=/CN=a peer=10.70.0.2:3
not a line
1795948440.118 submit pilotbed-relay[1]: INFO event=lease_renewed lease=bb port=41001 pilot=glidein_2 dn="broken peer=10.70.0.2:4
"""  # noqa: E501


def runs() -> list[Payload]:
    return [from_json(one) for one in RUNS]


# -- what is meant -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "meant"), [
    ("22.0", ("submit", "22.0")), ("22", ("submit", "22.0")), ("submit#22.1", ("submit", "22.1")),
    ("submit.grid.test#22.0#1795229257", ("submit", "22.0")), ("0022.00", ("submit", "22.0")),
])  # fmt: skip
def test_job_ids(text: str, meant: tuple[str, str]) -> None:
    assert found.job_of(text, ["submit"]) == meant


@pytest.mark.parametrize(
    "text", ["", "x", "22.0;id", "22.0 -all", "-1", "1.2.3", "$(id)", "22.0\n", "#22.0", "²2.0", "9" * 30]
)
def test_what_is_no_job_id_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(GridError, match=r"no job's id: write CLUSTER\.PROC, such as 22\.0 or submit#22\.0"):
        found.job_of(text, ["submit"])


def test_of_several_schedds_one_has_to_be_named() -> None:
    with pytest.raises(GridError, match=r"which schedd's.*submit, other: write submit#22\.0"):
        found.job_of("22.0", ["submit", "other"])
    assert found.job_of("other#22.0", ["submit", "other"]) == ("other", "22.0")
    with pytest.raises(GridError, match="nowhere is no submit host of this inventory"):
        found.job_of("nowhere#22.0", ["submit", "other"])


@pytest.mark.parametrize("dn", [
    ALICE, rf"{PEOPLE}J\xC3\xBCrgen", rf"{PEOPLE}Robot\/Alice", f'{PEOPLE}the "boss"', f"{PEOPLE}$(id) `id` ; ' *",
])  # fmt: skip
def test_a_user_of_any_name_is_carried_as_he_is(dn: str) -> None:
    user = found.user_of({**AD, "x509userproxysubject": dn}, {})
    assert user == {"account": "alice", "user": "alice@grid.test", "dns": [dn],
                    "fqan": "/gridlab/analysis/Role=NULL/Capability=NULL"}  # fmt: skip


def test_a_job_without_a_proxy_is_its_accounts() -> None:
    ad = {**AD, "x509userproxysubject": None}
    assert found.user_of(ad, {"alice": ALICE})["dns"] == [ALICE]
    with pytest.raises(GridError, match=r"grid_users does not name alice: ban him by\s+playbooks/ban.yml"):
        found.user_of(ad, {})


@pytest.mark.parametrize("change", [
    {"x509userproxysubject": "Alice"}, {"x509userproxysubject": f"{PEOPLE}a\nb"}, {"x509userproxysubject": "/CN=\0"},
    {"Owner": None}, {"User": "/Expr(x)/"}, {"Owner": 7},
])  # fmt: skip
def test_an_ad_that_says_of_nobody_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GridError, match=r"cannot be banned|names no owner"):
        found.user_of({**AD, **change}, {})


@given(st.dictionaries(st.sampled_from([*AD]), st.none() | st.integers() | st.text() | st.lists(st.text())))
def test_an_absurd_ad_is_reported_or_refused(change: dict[str, Any]) -> None:
    ad = {**AD, **change}
    told = found.of_job(ad, runs())
    json.dumps(told)
    assert found.span(ad, runs(), hunt.queued(ad), time.time())[0] >= -600
    try:
        found.user_of(ad, {"alice": ALICE})
    except GridError as error:
        assert found.plain(error).isprintable()


def test_the_last_run_says_where_a_job_is() -> None:
    mine = found.runs_of("submit.grid.test#3.0", [*runs(), from_json({**RUNS[0], "id": "submit.grid.test#3.01#1"})])
    assert len(mine) == 2
    told = found.of_job(AD, mine)
    assert (told["site"], told["node"], told["payload account"]) == ("alpha", "wn1.grid.test", "gl016")
    assert told["pilot"]["batch job"] == "htcondor 2.0"
    assert told["pilot"]["factory job"] == "1.1"
    assert [one["ended"] for one in told["runs"]] == ["signal 15", "running"]


def test_a_job_that_never_ran_has_no_pilot() -> None:
    told = found.of_job({name: value for name, value in AD.items() if not name.startswith("Machine")}, [])
    assert (told["node"], told["pilot"]["factory job"], told["runs"]) == ("", "", [])


def test_the_time_of_a_submission_is_the_schedds_word() -> None:
    assert hunt.queued(AD) == 1795948441
    assert hunt.queued({"QDate": 5, "GlobalJobId": "other"}) == pytest.approx(time.time() - 86400, abs=60)


@pytest.mark.parametrize(("status", "last", "span"), [
    (2, None, (1795948442.567 - 600, 1795950000)),
    (4, 1795948500, (1795948442.567 - 600, 1795949100)),
    (5, 1795948500, (1795948442.567 - 600, 1795950000)),
])  # fmt: skip
def test_the_logs_that_matter(status: int, last: float | None, span: tuple[float, float]) -> None:
    mine = [from_json(RUNS[0]), from_json({**RUNS[1], "end": last})]
    assert found.span({"JobStatus": status}, mine, 1795948441, 1795950000) == span


@given(st.text())
def test_nothing_steers_a_terminal(text: str) -> None:
    assert found.plain(text).isprintable()


# -- from an address -----------------------------------------------------------------------------------------------

HOSTS: dict[str, dict[str, Any]] = {
    "relay": {"node_addresses": {"wan": "10.70.0.17"}},
    "router": {"node_addresses": {"wan": "10.70.0.2", "alpha": "10.71.0.1"}, "site_name": "alpha",
               "site_router_flavour": "nat"},
    "wn1": {"node_addresses": {"alpha": "10.71.0.21"}, "node_public_address": "10.70.0.2", "site_name": "alpha"},
    "wn2": {"node_addresses": {"alpha": "10.71.0.22"}, "site_name": "alpha"},
    "wn3": {"node_addresses": {"beta": "10.72.0.21"}, "site_name": "beta"},
    "submit": {"node_addresses": {"wan": "10.70.0.14"}},
}  # fmt: skip
GROUPS = {"relay": ["relay"], "site_router": ["router"], "worker": ["wn1", "wn2", "wn3"], "submit": ["submit"],
          "certificate_authority": ["submit"], "voms_server": ["submit"], "computing_element": ["router"]}  # fmt: skip
VARIABLES = {"grid_domain": "grid.test", "grid_vos": [{"name": "gridlab"}, {"name": "cosmo"}]}
KNOWN = Inventory({
    "_meta": {"hostvars": {name: {**VARIABLES, **theirs} for name, theirs in HOSTS.items()}},
    **{group: {"hosts": names} for group, names in GROUPS.items()},
})  # fmt: skip


@pytest.mark.parametrize(("address", "workers", "relay", "port"), [
    ("10.71.0.21", ("wn1",), "", 0), ("wn2.grid.test", ("wn2",), "", 0), ("10.72.0.21:5000", ("wn3",), "", 0),
    ("10.70.0.2", ("wn1", "wn2"), "", 0), ("10.71.0.1", ("wn1", "wn2"), "", 0),
    ("10.70.0.17:41001", ("wn1", "wn2", "wn3"), "relay", 41001), ("relay", ("wn1", "wn2", "wn3"), "relay", 0),
])  # fmt: skip
def test_what_is_behind_an_address(address: str, workers: tuple[str, ...], relay: str, port: int) -> None:
    there = who.place(KNOWN, address)
    assert (there.workers, there.relay, there.port) == (workers, relay, port)


@pytest.mark.parametrize(("address", "said"), [
    ("10.70.0.14", "submit runs no payloads: it is submit"), ("192.0.2.7", "no node's address in this inventory"),
    ("$(id)", "neither an address nor a node's name"), ("", "no address: write"), ("relay:0", "no address: write"),
    ("relay:x", "no address: write"), ("relay:99999", "no address: write"), (":41001", "no address: write"),
    ("None", "neither"),
])  # fmt: skip
def test_an_address_that_leads_nowhere_is_refused(address: str, said: str) -> None:
    with pytest.raises(GridError, match=re.escape(said)):
        who.place(KNOWN, address)


@pytest.mark.parametrize(("port", "at", "pilots"), [
    (41001, 1795948412, []), (41001, 1795948421, ["glidein_1"]), (41001, 1795948430.5, []),
    (41001, 1795948435, ["glidein_2"]), (0, 1795948435, ["glidein_2", "glidein_3"]), (41003, 1795948435, []),
    (41001, 1795948500, ["glidein_2"]),
])  # fmt: skip
def test_who_had_a_port_of_the_relays(port: int, at: float, pilots: list[str]) -> None:
    assert [one["pilot"] for one in who.leases(RELAY.splitlines(), port, at)] == pilots


def test_the_payloads_of_a_lease() -> None:
    had = [{"pilot": "glidein_1144_414731926"}]
    one = runs()[0]
    assert who.through([one], had, {one.id: AD["RemoteHost"]}) == [one]
    assert who.through([one], had, {one.id: "slot1_1@glidein_1@wn1.grid.test"}) == []
    assert who.through([one], had, {}) == [one], "nobody knows better"


# -- the record, and what is taken back -----------------------------------------------------------------------------


class Grid:
    """Blocks by place, as nodes have them; ``down`` are nodes that do not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.put: set[tuple[str, str, str]] = set()
        self.down: set[str] = set()
        self.held: dict[str, str] = {}  # job: whose hold
        self.seen: list[tuple[str, Any]] = []  # what was on disk when a block was put
        monkeypatch.setattr(cli, "KINDS", {kind: self.kind(kind) for kind in blocks.KINDS})

    def kind(self, kind: str) -> blocks.Block:
        if kind == "jobs":
            return blocks.Block(lambda step: kind, lambda step: self.answer(step) and False, self.hold, self.release)
        return blocks.Block(lambda step: kind, self.asked, self.add, self.lift)

    def answer(self, step: Step) -> bool:
        if step.node in self.down:
            raise NodeError(f"{step.node} does not answer")
        return True

    def asked(self, step: Step) -> bool | None:
        self.answer(step)
        return None if step.subject.startswith("cosmo ") else step.place in self.put

    def add(self, step: Step, one: Record) -> None:
        self.answer(step)
        self.seen.append((step.kind, record.load(one.directory)))
        self.put.add(step.place)

    def lift(self, step: Step, one: Record) -> None:
        self.answer(step)
        self.put.discard(step.place)

    def hold(self, step: Step, one: Record) -> None:
        self.answer(step)
        self.held = {job: by or one.id for job, by in self.held.items()}

    def release(self, step: Step, one: Record) -> None:
        self.answer(step)
        self.held = {job: "" if by in (one.id, *step.also) else by for job, by in self.held.items()}


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Grid:
    return Grid(monkeypatch)


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(cli, "incidents", lambda: tmp_path)
    umask = os.umask(0o077)
    yield tmp_path
    os.umask(umask)


def frozen(top: Path, name: str, dn: str = ALICE) -> Record:
    """An incident with all blocks that can be put."""
    one = record.open_one(top, name, f"submit#{name}#1", "test")
    cli.all_blocks(one, KNOWN, "alice@grid.test", [dn])
    one.state = "frozen"
    one.save()
    return one


def thawed(name: str) -> int:
    return cli.main(["thaw", name])


def test_freeze_blocks_everywhere_and_thaw_takes_all_of_it_back(grid: Grid, top: Path) -> None:
    grid.held = {"1.0": "", "1.1": "somebody"}
    one = frozen(top, "a")
    assert {(kind, node) for kind, node, _ in grid.put} == {
        ("user", "submit"), ("ban", "router"), ("ban", "wn1"), ("ban", "wn2"), ("ban", "wn3"), ("vo", "submit"),
    }  # fmt: skip
    assert [step.outcome for step in one.steps if step.subject.startswith("cosmo")] == ["nothing to do"]
    assert grid.held == {"1.0": "a", "1.1": "somebody"}
    assert thawed("a") == 0
    assert grid.put == set()
    assert grid.held == {"1.0": "", "1.1": "somebody"}
    assert record.load(top / "a").state == "thawed"
    assert thawed("a") == 0, "once more does nothing"


def test_every_step_is_on_disk_before_it_is_taken(grid: Grid, top: Path) -> None:
    frozen(top, "a")
    assert len(grid.seen) == 6
    for kind, one in grid.seen:
        assert any(step.kind == kind and step.before is False and not step.outcome for step in one.steps)


def test_a_block_that_was_there_before_stays(grid: Grid, top: Path) -> None:
    before = {("ban", "wn1", ALICE), ("vo", "submit", f"gridlab {ALICE}")}
    grid.put |= before
    frozen(top, "a")
    frozen(top, "a")  # a second attempt does not take its own blocks for older ones, nor these for its own
    assert thawed("a") == 0
    assert grid.put == before


def test_a_freeze_that_was_killed_at_any_point_is_taken_back(
    grid: Grid, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kill -9 leaves it: what was on disk when a block was being put, which has been put or not."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(cli, "side_by_side", lambda names, work: [work(name) for name in dict.fromkeys(names)])
    grid.put = before = {("ban", "wn2", ALICE)}
    for at in range(12):
        for then in ("before", "after"):
            grid.put = set(before)
            count = iter(range(100))

            def put(step: Step, one: Record, at: int = at, then: str = then, count: Iterator[int] = count) -> None:
                mine = next(count) == at
                if mine and then == "before":
                    raise Killed
                grid.put.add(step.place)
                if mine:
                    raise Killed

            kinds = {kind: blocks.Block(lambda step: "", grid.asked, put, grid.lift) for kind in blocks.KINDS}
            name = f"{at}-{then}"
            with monkeypatch.context() as patched:
                patched.setattr(cli, "KINDS", kinds)
                try:
                    frozen(top, name)
                except Killed:
                    assert record.load(top / name).state == "freezing"
            monkeypatch.setattr(cli, "KINDS", kinds)
            assert thawed(name) == 0
            assert grid.put == before, name


def test_kill_9_leaves_a_whole_record(tmp_path: Path) -> None:
    """Real ones, of a process that does nothing but write records."""
    program = (
        "import sys, pathlib\nfrom pilotbed_suite.incident import record\n"
        "one = record.open_one(pathlib.Path(sys.argv[1]), 'a', 'submit#1.0#1', 'x' * 5000)\nprint(flush=True)\n"
        "for n in range(10**6): one.begin(one.step('ban', f'wn{n}', 'dn'), False)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    one = record.load(tmp_path / "a")
    assert one.steps
    assert all(step.before is False and not step.outcome for step in one.steps)


def test_a_node_that_does_not_answer_stops_nothing_and_is_gone_on_with(grid: Grid, top: Path) -> None:
    grid.down = {"wn2"}
    one = frozen(top, "a")
    assert [step.node for step in one.steps if step.outcome.startswith("failed")] == ["wn2"]
    assert len(grid.put) == 5
    grid.down = set()
    assert frozen(top, "a").id == "a"
    assert len(grid.put) == 6
    grid.down = {"router"}
    assert thawed("a") == 1
    assert {node for _, node, _ in grid.put} == {"router"}
    with pytest.raises(GridError, match="half thawed"):
        frozen(top, "a")
    grid.down = set()
    assert thawed("a") == 0
    assert grid.put == set()


def test_what_was_never_blocked_is_not_lifted(grid: Grid, top: Path) -> None:
    grid.down = {"wn2"}
    frozen(top, "a")
    grid.put.add(("ban", "wn2", ALICE))  # an operator's, later
    grid.down = set()
    assert thawed("a") == 0
    assert grid.put == {("ban", "wn2", ALICE)}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_of_two_incidents_of_one_user_the_last_one_lifts(grid: Grid, top: Path, order: tuple[str, str]) -> None:
    grid.held = {"1.0": ""}
    frozen(top, "a")
    grid.held["2.0"] = ""
    frozen(top, "b")
    before = set(grid.put)
    assert thawed(order[0]) == 0
    assert grid.put == before
    assert set(grid.held.values()) == {"a", "b"}
    assert thawed(order[1]) == 0
    assert grid.put == set()
    assert set(grid.held.values()) == {""}


def test_of_three_incidents_all_are_needed(grid: Grid, top: Path) -> None:
    grid.put = before = {("ban", "wn1", ALICE)}
    for name in "abc":
        frozen(top, name)
    for name in "bac":
        assert len(grid.put) == 6
        assert thawed(name) == 0
    assert grid.put == before


def test_another_users_incident_needs_nothing_of_it(grid: Grid, top: Path) -> None:
    frozen(top, "a")
    frozen(top, "b", f"{PEOPLE}Bob Brown")
    assert thawed("a") == 0
    theirs = {subject.removeprefix("gridlab ") for kind, _, subject in grid.put if kind in ("ban", "vo")}
    assert theirs == {f"{PEOPLE}Bob Brown"}


def test_a_job_that_is_frozen_again_after_a_thaw_is_another_incident(grid: Grid, top: Path) -> None:
    frozen(top, "a")
    thawed("a")
    assert frozen(top, "a").id == "a-2"
    assert [one.id for one in record.every(top)] == ["a", "a-2"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema": 2}', '{"schema": 1, "steps": [{"kind": 1}]}', '{"schema": 1}']
)
def test_what_is_no_record_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / record.NAME).write_text(text)
    with pytest.raises(GridError, match=r"record\.json is no incident's record"):
        record.load(tmp_path)


def test_a_record_that_is_broken_stops_no_other(grid: Grid, top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen(top, "a")
    (top / "a" / record.NAME).write_text("{")
    assert frozen(top, "a").id == "a-2"
    assert cli.main(["list"]) == 1
    said = capsys.readouterr()
    assert "a/record.json is no incident's record" in said.err
    assert said.out.splitlines()[-1].startswith("a-2  frozen")


def test_only_one_at_a_time(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cli.alone(top):
        assert thawed("a") == 2
    assert "another pilotbed-incident is at work" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../a", "", "a/b", ".lock", "-x", "nobody"])
def test_thaw_of_no_incident(top: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["thaw", "--", name]) == 2
    assert "pilotbed-incident list has those that there are" in capsys.readouterr().err


def test_the_holds_of_an_incident_are_known_by_their_reason() -> None:
    one = Record(Path(), "submit-1.0-1", "submit#1.0#1", "x\"y")
    step = Step("jobs", "submit", "", also=["submit-2.0-2"])
    assert blocks.told(one) == "incident submit-1.0-1: x\"y"
    assert blocks.held_by(one, step) == (
        'JobStatus == 5 && (substr(HoldReason ?: "", 0, 23) == "incident submit-1.0-1: " '
        '|| substr(HoldReason ?: "", 0, 23) == "incident submit-2.0-2: ")'
    )


def test_a_user_in_a_constraint_is_a_text() -> None:
    said = blocks.his_jobs('a"||true||"', ['/CN=x" || true', r"/CN=\xC3"])
    assert said == (r'(User =?= "a\"||true||\"" || x509userproxysubject =?= "/CN=x\" || true" '
                    r'|| x509userproxysubject =?= "/CN=\\xC3")')  # fmt: skip


@pytest.mark.parametrize("user", ["alice", "*@grid.test", "alice@grid.test bob@grid.test", "a/../b@x", "a\n@x"])
def test_who_is_denied_is_one_user(user: str) -> None:
    with pytest.raises(NodeError, match="is no user of a schedd"):
        blocks.KINDS["user"].asked(Step("user", "submit", user))


def test_who_reads_no_further_stops_nothing() -> None:
    program = (
        "import sys\nfrom pilotbed_suite.incident import cli\nfor n in range(9999): cli.say('x' * 99)\n"
        "sys.stderr.write('end')"
    )
    command = f"{sys.executable} -c {shlex.quote(program)} | head -n 1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{'x' * 99}\n", "end")


# -- asking nodes --------------------------------------------------------------------------------------------------


class Host:
    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run


@pytest.fixture(autouse=True)
def _nobody_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_silent", {})


def test_a_node_that_hangs_is_given_up_and_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MORE", 0.1)
    monkeypatch.setattr(nodes, "host", lambda name: Host(lambda *words: time.sleep(60)))
    with pytest.raises(NodeError, match="wn1 does not answer: nothing within"):
        nodes.ask("wn1", "true", deadline=0.1)
    monkeypatch.setattr(nodes, "host", lambda name: pytest.fail("asked again"))
    with pytest.raises(NodeError, match="wn1 does not answer"):
        nodes.ask("wn1", "true")


def test_what_a_connection_raises_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> None:
        raise EOFError

    monkeypatch.setattr(nodes, "host", lambda name: Host(run))
    answers = nodes.side_by_side(["wn1"], lambda node: nodes.ask(node, "true"))
    assert str(answers["wn1"]) == "wn1 does not answer: EOFError"


@pytest.mark.parametrize("text", ["{", '"x"', "Failed to connect"])
def test_what_is_no_list_is_told(text: str) -> None:
    with pytest.raises(NodeError, match="submit: what it printed is no"):
        nodes.listed("submit", nodes.Answer("submit", 0, text.encode(), ""))


class Result:
    """testinfra's."""

    def __init__(self, said: object, rc: int = 0) -> None:
        self.rc, self.stderr = rc, "it failed" if rc else ""
        self.stdout_bytes = (said if isinstance(said, str) else json.dumps(said)).encode()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each node's programs print: by node and program; without an answer the node does not answer."""
    said: dict[str, Any] = {}

    def host(name: str) -> Host:
        def run(command: str, *args: str) -> Result:
            program = command.split()[4]  # behind timeout(1)
            if f"{name} {program}" not in said:
                raise OSError("no route to host")
            return Result(said[f"{name} {program}"])

        return Host(run)

    monkeypatch.setattr(nodes, "host", host)
    return said


MALLORY = f"{PEOPLE}Mallory Mean"
#: KNOWN's wn1 is the worker of AD; onnode/look.py is run there by python3.
LOOKED = {"at": 1.0, "files": [], "cut": 0, "payloads": [{"log": {}, "files": [
    {"path": "/tmp/x509up", "certificates": ["ab", "cd"]}, {"path": "/tmp/a\x1b[2J"}]}]}  # fmt: skip


def test_whose_a_job_is_by_the_schedd_and_by_glexec(answers: dict[str, Any]) -> None:
    answers.update({"submit condor_q": [AD], "wn1 pilotbed-trace": [RUNS[0], {**RUNS[1], "dn": MALLORY}]})
    ad, user = hunt.identify(KNOWN, "submit", "3.0")
    assert ad == AD
    assert user["dns"] == [ALICE, MALLORY]
    del answers["wn1 pilotbed-trace"]
    assert hunt.identify(KNOWN, "submit", "3.0")[1]["dns"] == [ALICE]


def test_a_job_that_nobody_knows(answers: dict[str, Any]) -> None:
    answers.update({"submit condor_q": "", "submit condor_history": "[\n]\n"})
    with pytest.raises(GridError, match=r"submit knows no job 9\.0"):
        hunt.identify(KNOWN, "submit", "9.0")
    answers["submit condor_history"] = "Failed to connect"
    with pytest.raises(NodeError, match="what it printed is no JSON"):
        hunt.identify(KNOWN, "submit", "9.0")


def test_without_the_schedd_only_a_known_incident_goes_on(
    answers: dict[str, Any], grid: Grid, top: Path
) -> None:
    with pytest.raises(GridError, match=r"whose job 3\.0 is, only it can say: if you know, playbooks/ban\.yml"):
        cli.begin(KNOWN, "3.0", "")
    one = frozen(top, "3.0")
    one.found = {"ad": AD, "user": {"dns": [ALICE]}}
    one.save()
    assert cli.begin(KNOWN, "3.0", "")[0].id == one.id
    thawed(one.id)
    with pytest.raises(GridError, match="only it can say"):
        cli.begin(KNOWN, "3.0", "")


def test_what_is_found_stays_when_its_worker_goes(answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunt, "pilot_at_element", lambda known, number: {"computing element job": f"arc {number}"})
    user = found.user_of(AD, {})
    answers.update({"wn1 pilotbed-trace": RUNS, "wn2 pilotbed-trace": [], "wn1 python3": LOOKED,
                    "submit python3": {"at": 1.0, "payloads": [], "files": [], "cut": 0}})  # fmt: skip
    first, mine, silent = hunt.look(KNOWN, "submit", "3.0", AD, user, {})
    assert (len(mine), silent) == (2, ["wn3 does not answer: no route to host"])
    assert first["pilot"]["computing element job"] == "arc 1.1"
    said = "\n".join(found.lines(first))
    assert "SHA-256 ab in wn1:/tmp/x509up" in said
    assert "\x1b" not in said
    for name in ("wn1 pilotbed-trace", "wn1 python3"):
        del answers[name]
    monkeypatch.setattr(hunt, "pilot_at_element", lambda known, number: {})
    again, _, silent = hunt.look(KNOWN, "submit", "3.0", AD, user, first)
    assert len(silent) == 2
    for name in ("node", "payload account", "runs", "pilot", "looks"):
        assert again[name] == first[name]


def test_what_was_done_goes_with_the_logs(answers: dict[str, Any], grid: Grid, top: Path) -> None:
    """No node answers: all that is not done is said, and the rest is kept."""
    one = frozen(top, "a")
    one.found = {"job": "submit#3.0"}
    left = cli.collect(one, KNOWN, 0, 1)
    assert len(left) == len(HOSTS) + 1
    assert left[-1].startswith("the archive is not signed: submit does not answer")
    done = json.loads((one.directory / archive.EVIDENCE / "done.json").read_text())
    assert {step["outcome"] for step in done["steps"]} == {"done", "nothing to do"}
    assert len(done["not done"]) == len(HOSTS)
    assert (one.directory / archive.ARCHIVE).is_file()


# -- the archive ---------------------------------------------------------------------------------------------------

BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj\n" * 20
KEY = f"-----BEGIN PRIVATE KEY-----\n{BODY}-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize("text", [
    KEY, KEY.replace("PRIVATE", "RSA PRIVATE"), f"before\n{KEY}behind\n{KEY}", KEY.replace("\n", "\\n"),
    KEY.replace("\n", "\nNov 29 wn1 logger: "), KEY.partition("-----END")[0],
])  # fmt: skip
def test_private_keys_are_left_out(text: str) -> None:
    kept = archive.without_keys(text.encode()).decode()
    assert "PRIVATE KEY" not in kept
    assert BODY[:32] not in kept


def test_what_stands_between_the_lines_of_a_key_stays() -> None:
    """Who can write to a log could else have what others wrote vanish from it."""
    line = 'caller="pilot009" target="gl016" dn="/DC=test/CN=Mallory Mean"'
    text = f"-----BEGIN PRIVATE KEY-----\n{line}\n-----END PRIVATE KEY-----\n"
    assert line in archive.without_keys(text.encode()).decode()
    assert archive.without_keys(b"PRIVATE: KEY\n" + BODY.encode()) == b"PRIVATE: KEY\n" + BODY.encode()


def test_many_beginnings_of_keys_take_no_time() -> None:
    def seconds(many: int) -> float:
        begun = time.process_time()
        assert b"PRIVATE KEY" not in archive.without_keys(b"-----BEGIN PRIVATE KEY-----" * many)
        return time.process_time() - begun

    # 20 to 30 times as much for twenty times as many, by trying; what looks at all that follows each needs 400 times.
    assert seconds(80_000) < 150 * min(seconds(4_000) for _ in range(3))


def sent(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in (*members, ("about.json", b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.type = tarfile.REGTYPE if name == "about.json" else kind
            member.linkname = "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


def test_what_a_node_sends_is_unpacked(tmp_path: Path) -> None:
    assert archive.unpack("wn1", sent(("files/var/log/a\nb $(x).log", b"text")), tmp_path / "wn1") == 2
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [
        "wn1/about.json", "wn1/files/var/log/a_b___x_.log"
    ]  # fmt: skip


@pytest.mark.parametrize("data", [
    b"", b"not a tar", sent(("a", b"x"))[:60], sent(("../a", b"x")), sent(("/etc/cron.d/a", b"x")),
    sent(("files/../../a", b"x")),
], ids=["empty", "no tar", "cut off", "above", "from the root", "round about"])  # fmt: skip
def test_what_is_no_archive_or_leads_outside_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(NodeError, match=r"^wn1: "):
        archive.unpack("wn1", data, tmp_path / "wn1")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "wn1" not in path.parents] == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_not_taken(tmp_path: Path, kind: bytes) -> None:
    assert archive.unpack("wn1", sent(("a", b""), kind=kind), tmp_path) == 1


def test_an_archive_has_its_manifest(tmp_path: Path) -> None:
    archive.evidence(tmp_path, {"found": {"reason": "ü\n\ud800", "key": KEY}})
    (tmp_path / archive.EVIDENCE / "wn1").mkdir()
    (tmp_path / archive.EVIDENCE / "wn1/log").write_text("x")
    archive.pack(tmp_path, "a")
    archive.pack(tmp_path, "a")
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "xf", tmp_path / archive.ARCHIVE], cwd=out, check=True)
    subprocess.run(["sha256sum", "--quiet", "--check", archive.MANIFEST], cwd=out / "a", check=True)
    assert {path.name for path in (out / "a").rglob("*") if path.is_file()} == {archive.MANIFEST, "found.json", "log"}
    assert "PRIVATE KEY" not in (out / "a/found.json").read_text()
    assert (tmp_path / archive.ARCHIVE).stat().st_mode & 0o777 == 0o600


# -- on the nodes --------------------------------------------------------------------------------------------------


def test_a_look_at_files_follows_no_link_and_waits_for_no_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "_end", time.monotonic() + 60)
    pem = "-----BEGIN CERTIFICATE-----\nAAECAw==\n-----END CERTIFICATE-----\n"
    (tmp_path / "proxy").write_text(pem + KEY + pem)
    (tmp_path / "link").symlink_to("/etc/shadow")
    os.mkfifo(tmp_path / "pipe")
    odd = os.fsencode(tmp_path) + b"/\xff\n$(x)"
    Path(os.fsdecode(odd)).write_text("x")
    paths = list(look.below(str(tmp_path), None))
    files, cut = look.looked_at([*paths, "/nowhere"])
    told = {Path(one["path"]).name: one for one in json.loads(json.dumps(files))}
    assert (set(told), cut) == ({"proxy", "link", "pipe", os.fsdecode(b"\xff\n$(x)")}, 0)
    digest = "054edec1d0211f624fed0cbca9d4f9400b0e491c43742af2c5b0abebf0c990d8"
    assert told["proxy"]["certificates"] == [digest, digest]
    assert told["link"]["leads to"] == "/etc/shadow"
    assert "sha256" not in told["link"]
    assert "sha256" not in told["pipe"]
    assert "PRIVATE" not in json.dumps(files)


def test_logs_of_a_time_are_those_that_were_written_to_since(tmp_path: Path) -> None:
    for name, age in (("a.log", 0), ("a.log.1", 5000), ("b.log", 0), ("c", 0)):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "d.log").symlink_to("/etc/shadow")
    os.mkfifo(tmp_path / "e.log")
    found_here = collect.written([f"{tmp_path}/*.log"], time.time() - 3600)
    assert [(Path(path).name, end) for path, _, _, end in found_here] == [("a.log", b"a.log"), ("b.log", b"b.log")]
