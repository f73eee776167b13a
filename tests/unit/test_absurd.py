"""No ad and no file of somebody else's ends a daemon, or keeps it from its work for the others; nor does a restart."""

from __future__ import annotations

import datetime as dt
import functools
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pki
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pilotbed.factory.config import Config as FactoryConfig
from pilotbed.factory.config import Entry, Limits, Stage
from pilotbed.factory.config import Frontend as Client_
from pilotbed.factory.daemon import Factory
from pilotbed.factory.decisions import Pilot
from pilotbed.frontend.config import Config, Pressure, Schedd
from pilotbed.frontend.config import Factory as Trusted_
from pilotbed.frontend.daemon import Frontend, credential_id
from pilotbed.frontend.decisions import Job, Slot
from pilotbed.pool import PoolError
from pilotbed.pool.door import classad, plain
from pilotbed.pool.values import LARGEST, AbsurdValue, Ad, Expr, Value, number, text
from pilotbed.protocol.ads import (
    Client,
    ClientStage,
    Credentials,
    FactoryName,
    GlobalOffer,
    Kind,
    Offer,
    Removal,
    Request,
    Sealed,
    group_ad,
)
from pilotbed.protocol.crypto import FactoryKey, SessionKey
from pilotbed.protocol.manifest import Signed
from pilotbed.x509.chain import make_proxy
from poolbed import ABSURD, Pool, manifest, spoilt, state

FACTORY, CLIENT = FactoryName("v1", "factory"), Client("vo", "main")
FRONTEND_ID, FACTORY_ID = "frontend@grid.test", "factory@grid.test"
KEY, OTHER_KEY = FactoryKey.generate(), FactoryKey.generate()
FEW = settings(max_examples=100, suppress_health_check=list(HealthCheck))


@functools.cache
def pilot_proxy() -> str:
    """Return the pilots' proxy; no fixture, as hypothesis would print it."""
    with place() as directory:
        person = pki.Authority(directory).issue("/DC=test/DC=grid/O=Gridlab/OU=Services/CN=pilot")
        return make_proxy(person, dt.timedelta(hours=12)).pem().decode()


@contextmanager
def place() -> Iterator[Path]:
    """A directory for one example: pytest's are for a whole test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# -- the frontend


def offer(entry: str, key: FactoryKey = KEY, name: FactoryName = FACTORY) -> Ad:
    attributes = {"GLIDEIN_Site": entry, "GLIDEIN_CPUS": 1, "GLIDEIN_MaxMemMBs": 2000, "GLIDEIN_Traversal": "direct"}
    one = Offer(name, entry, attributes, {"GLIDEIN_Collector": ""}, False, key.public_pem, key.key_id, {"Max": 9})
    return one.to_ad() | {"AuthenticatedIdentity": FACTORY_ID}


def global_offer(key: FactoryKey = KEY, name: FactoryName = FACTORY) -> Ad:
    return GlobalOffer(name, key.public_pem, key.key_id).to_ad() | {"AuthenticatedIdentity": FACTORY_ID}


def job(number: int, **more: Value) -> Ad:
    return {
        "MyType": "Job", "ClusterId": number, "ProcId": 0, "Owner": "alice", "JobUniverse": 5, "JobStatus": 1,
        "x509userproxy": "/tmp/x", "EnteredCurrentStatus": 1_700_000_000, "QDate": 1_700_000_000, "RequestCpus": 1,
        "RequestMemory": Expr("ifThenElse(MemoryUsage =!= undefined,MemoryUsage,(ImageSize + 1023) / 1024)"),
        "RequestDisk": Expr("DiskUsage"), "DiskUsage": 40, "ImageSize": 100, "DESIRED_Sites": "alpha",
    } | more  # fmt: skip


SCHEDD: Ad = {
    "MyType": "Scheduler", "Name": "submit", "TotalRunningJobs": 1, "MaxJobsRunning": 100,
    "TransferQueueNumUploading": 0, "TransferQueueMaxUploading": 100, "CurbMatchmaking": False,
}  # fmt: skip
SLOT: Ad = {
    "MyType": "Machine", "IS_GLIDEIN": True, "GLIDECLIENT_Name": "vo.main", "LastHeardFrom": 2**40,
    "Name": "slot1@pilot@wn", "State": "Claimed", "Activity": "Busy", "PartitionableSlot": True, "TotalSlots": 1,
    "Cpus": 1, "Memory": 2000,
    "GLIDEIN_Entry_Name": "beta", "GLIDEIN_Name": "v1", "GLIDEIN_Factory": "factory", "TotalSlotCpus": 1,
    "TotalSlotMemory": 2000, "TotalSlotDisk": 9_000_000, "TotalSlotGPUs": 0,
}  # fmt: skip
WAITING = job(1)


@contextmanager
def frontend(pool: Pool, factories: Sequence[str] = ("factory",)) -> Iterator[Frontend]:
    with place() as directory, pool.installed("pilotbed.frontend.daemon"):
        (directory / "proxy.pem").write_text(pilot_proxy())
        manifest(directory / "manifest.json", groups=["main"])
        yield Frontend(
            Config("vo", "main", FRONTEND_ID, "cert", "key", "vo", "pilot", "pool", (Schedd("submit"),),
                   tuple(Trusted_(one, FACTORY_ID) for one in factories), directory / "proxy.pem",
                   manifest=directory / "manifest.json",
                   status=directory / "state.json", downtime=directory / "downtime",
                   pressure=Pressure(attenuation=1))
        )  # fmt: skip


def asked(pool: Pool, entry: str = "alpha") -> Value | None:
    """Return how many pilots are asked for at an entry; None if nothing was said to it."""
    found = [ad for name, ad in pool.told(Kind.REQUEST.my_type).items() if f"_{entry}@" in name]
    return found[-1]["ReqIdleGlideins"] if found else None


@dataclass(frozen=True)
class Spoilt:
    """One ad of which anything may have become anything, among good ones."""

    kind: str
    ad: Ad


SPOILT_FOR_FRONTEND = st.one_of(
    spoilt(job(2), Job.ATTRIBUTES).map(lambda ad: Spoilt("job", ad)),
    spoilt(job(2, JobStatus=2, RemoteHost="slot1@pilot@wn"), Job.ATTRIBUTES).map(lambda ad: Spoilt("job", ad)),
    spoilt(SLOT, Slot.ATTRIBUTES).map(lambda ad: Spoilt("slot", ad)),
    spoilt(SCHEDD).map(lambda ad: Spoilt("schedd", ad)),
    spoilt(offer("beta"), ("GLIDEIN_ESTIMATED_CPUS", "GLIDEIN_Resource_Slots", "GLIDEIN_MaxDiskMBs")).map(
        lambda ad: Spoilt("offer", ad)
    ),
    spoilt(global_offer(OTHER_KEY, FactoryName("v2", "factory"))).map(lambda ad: Spoilt("key", ad)),
)


@FEW
@given(st.lists(SPOILT_FOR_FRONTEND, min_size=1, max_size=3))
def test_whatever_an_ad_says_the_frontend_asks_for_the_others_jobs(wrong: list[Spoilt]) -> None:
    jobs = [WAITING, *(one.ad for one in wrong if one.kind == "job")]
    schedds = [SCHEDD] if not any(one.kind == "schedd" for one in wrong) else []
    pool = Pool([global_offer(), offer("alpha"), *schedds, *(one.ad for one in wrong if one.kind != "job")], jobs)
    with frontend(pool) as daemon:
        try:
            daemon.turn()
            daemon.turn()
        except Exception as error:
            # A schedd whose ad has lost its name is one that is not there: no decision, as ever.
            assert any(one.kind == "schedd" for one in wrong), error
            assert "knows no schedd submit" in str(error)
            return
        assert daemon.errors == 0, daemon.said
        # A schedd that says it is full has no jobs that could start.
        assert asked(pool) in range(1 if schedds else 0, 10)
        assert state(daemon)["error"] == ""


def test_the_job_of_the_report(caplog: pytest.LogCaptureFixture) -> None:
    """A held job with +RequestCpus = "four" was enough to stop the frontend for everybody, and again at every start."""
    caplog.set_level(logging.INFO)
    pool = Pool([global_offer(), offer("alpha"), SCHEDD], [WAITING, job(2, RequestCpus="four")])
    for _ in range(2):  # the second one is a restart: the ad is still there
        caplog.clear()
        with frontend(pool) as daemon:
            for _ in range(3):
                daemon.turn()
            assert asked(pool) == 1
            assert state(daemon)["left_out"] == [
                {"jobs": 1, "example": "2.0 (alice)", "why": 'RequestCpus is "four", not a number'}
            ]
            assert state(daemon)["absurd"] == {"jobs_left_out": 1}
            metrics = daemon.status_file.with_name("metrics.prom").read_text()
            assert "pilotbed_frontend_jobs_left_out 1\n" in metrics
            assert "# TYPE pilotbed_frontend_turns_total counter\npilotbed_frontend_turns_total 3\n" in metrics
        assert caplog.text.count("not a number") == 1  # not in each turn


def test_a_request_that_only_a_match_gives_a_value_is_no_absurd_one() -> None:
    half = job(1, RequestMemory=Expr("TARGET.Memory / 2"), RequestCpus=Expr("TARGET.Cpus"))
    pool = Pool([global_offer(), offer("alpha"), SCHEDD], [half])
    with frontend(pool) as daemon:
        daemon.turn()
        assert asked(pool) == 1
        assert state(daemon)["left_out"] == []


def test_an_entry_that_is_odd_says_so_and_is_used(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pool = Pool([global_offer(), offer("alpha") | {"GLIDEIN_CPUS": "auto", "GLIDEIN_MaxMemMBs": -5}, SCHEDD], [WAITING])
    with frontend(pool) as daemon:
        daemon.turn()
        daemon.turn()
        assert asked(pool) == 1
        assert state(daemon)["absurd"] == {"offers_values_replaced": 1}  # "auto" is a word of glideinWMS
    assert caplog.text.count("GLIDEIN_MaxMemMBs is -5, below 0") == 1


def test_jobs_that_fit_no_pilot_are_in_the_status() -> None:
    large = [job(number, RequestMemory=9000, Owner="bob") for number in (5, 6)]
    pool = Pool([global_offer(), offer("alpha"), SCHEDD], [*large, job(7, DESIRED_Sites=Expr('{ "gamma" }'))])
    with frontend(pool) as daemon:
        daemon.turn()
        assert asked(pool) == 0
        assert state(daemon)["left_out"] == [
            {"jobs": 2, "example": "5.0 (bob)", "why": "larger than any pilot at alpha: RequestMemory 9000 > 2000 MB"},
            {
                "jobs": 1,
                "example": "7.0 (alice)",
                "why": 'match no entry: DESIRED_Sites = { "gamma" }, RequestCpus = 1',
            },
        ]
        (entry,) = state(daemon)["entries"].values()
        assert entry["why"] == "no idle job matches; 2 larger than a pilot: RequestMemory 9000 > 2000 MB"


def test_a_defect_in_one_entry_is_its_own_affair(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool([global_offer(), offer("alpha"), offer("beta"), SCHEDD], [WAITING])
    with frontend(pool) as daemon, mock.patch.object(daemon, "request", side_effect=daemon.request) as request:
        real = Frontend.request

        def fail(decision: object, *rest: object) -> Request:
            if decision.offer.entry == "beta":  # type: ignore[attr-defined]
                raise ZeroDivisionError("a defect")
            return real(daemon, decision, *rest)  # type: ignore[arg-type]

        request.side_effect = fail
        for _ in range(3):
            daemon.turn()
        assert asked(pool) == 1
        assert asked(pool, "beta") is None
        assert daemon.errors == 3
        assert state(daemon)["errors"] == 3
    assert caplog.text.count("Traceback") == 1
    assert "request to beta@v1@factory" in caplog.text


def test_of_two_factories_one_may_be_away() -> None:
    """Each is asked for pilots of its own entries; the jobs of one that is away are the other's."""
    second = FactoryName("v1", "second")
    first_pool = Pool([global_offer(), offer("alpha"), SCHEDD], [job(1, DESIRED_Sites="alpha,beta")] * 4)
    other_pool = Pool([global_offer(OTHER_KEY, second), offer("beta", OTHER_KEY, second)])
    with frontend(first_pool, ("first", "second")) as daemon:
        daemon.factories[1].collector = other_pool  # type: ignore[assignment]
        daemon.turn()
        daemon.turn()
        assert (asked(first_pool, "alpha"), asked(other_pool, "beta")) == (2, 2)
        assert asked(first_pool, "beta") is asked(other_pool, "alpha") is None
        assert len(daemon.sessions) == 2
        with mock.patch.object(other_pool, "query", side_effect=PoolError("away")):
            daemon.turn()
            assert asked(first_pool, "alpha") == 5, "four, and one more for jobs that have waited long"
            with mock.patch.object(first_pool, "query", side_effect=PoolError("away, too")), pytest.raises(PoolError):
                daemon.turn()
        with mock.patch.object(other_pool, "advertise", side_effect=PoolError("full")):
            daemon.turn()
            assert asked(first_pool, "alpha") == 2


def test_a_factory_that_takes_anothers_name_is_left_out() -> None:
    first_pool = Pool([global_offer(), offer("alpha"), SCHEDD], [WAITING])
    other_pool = Pool([global_offer(OTHER_KEY)])
    with frontend(first_pool, ("first", "second")) as daemon:
        daemon.factories[1].collector = other_pool  # type: ignore[assignment]
        daemon.turn()
        assert asked(first_pool) == 1
        assert other_pool.sent == []
        assert daemon.absurd == {"offers_left_out": 1}


@pytest.mark.parametrize("spoilt_key", [{"PubKeyValue": "none"}, {"PubKeyValue": ""}, {"PubKeyType": "EC"}])
def test_a_factory_whose_key_is_none_is_no_factory_and_the_other_is(spoilt_key: Ad) -> None:
    """It was known by its name and had no session: KeyError, and nobody's pilots were asked for."""
    first_pool = Pool([global_offer(), offer("alpha"), SCHEDD], [WAITING])
    other_pool = Pool([global_offer(OTHER_KEY, FactoryName("v1", "second")) | spoilt_key])
    with frontend(first_pool, ("first", "second")) as daemon:
        daemon.factories[1].collector = other_pool  # type: ignore[assignment]
        for _ in range(2):
            daemon.turn()
            assert (asked(first_pool), daemon.errors) == (1, 0), daemon.said
        assert daemon.absurd == {"offers_left_out": 1}
        # Once its key is one; whatever number it has.
        mended = global_offer(OTHER_KEY, FactoryName("v1", "second")) | {"PubKeyID": KEY.key_id}
        other_pool.ads[:] = Pool([mended]).ads
        daemon.turn()
        assert len(daemon.sessions) == 2


# -- two frontends of one name


@contextmanager
def second(pool: Pool) -> Iterator[Frontend]:
    """The second frontend of two, which goes to work when the first has said nothing for a minute."""
    with frontend(pool) as daemon:
        daemon.config = replace(daemon.config, host="b", ahead=("a",), takeover=60)
        yield daemon


def word_of(host: str, **more: Value) -> Ad:
    ad = group_ad(Client("vo", "main"), {"Host": host})
    return ad | {"AuthenticatedIdentity": FRONTEND_ID, "LastHeardFrom": int(time.time())} | more


def test_a_frontend_stands_by_while_the_one_ahead_of_it_is_at_work() -> None:
    pool = Pool([global_offer(), offer("alpha"), SCHEDD, word_of("a")], [WAITING])
    with second(pool) as daemon:
        daemon.turn()
        assert pool.sent == []
        assert (state(daemon)["active"], state(daemon)["entries"]) == ("a", {})
        daemon.withdraw()
        assert pool.taken_back == [], "by name it is the other's"
        pool.ads[-1:] = Pool([word_of("a", LastHeardFrom=int(time.time()) - 61)]).ads
        daemon.turn()
        assert (asked(pool), state(daemon)["active"]) == (1, "b")
        assert pool.told(Kind.GROUP.my_type)["vo.main"]["GlideClientHost"] == "b"
        daemon.withdraw()
        assert pool.taken_back != []
        pool.ads[-1:] = Pool([word_of("a")]).ads
        daemon.turn()
        assert (state(daemon)["active"], state(daemon)["entries"]) == ("a", {}), "it is back"


@pytest.mark.parametrize("not_theirs", [
    word_of("b"), word_of("c"), word_of("a", AuthenticatedIdentity="pilot@grid.test"),
    word_of("a", GlideClientName="vo.x"), word_of("a", LastHeardFrom="now"), word_of("a", GlideClientHost=7),
])  # fmt: skip
def test_only_the_word_of_one_that_is_ahead_counts(not_theirs: Ad) -> None:
    pool = Pool([global_offer(), offer("alpha"), SCHEDD, not_theirs], [WAITING])
    with second(pool) as daemon:
        daemon.turn()
        assert asked(pool) == 1


def test_who_stands_by_must_have_a_name_of_its_own() -> None:
    with frontend(Pool()) as daemon, pytest.raises(ValueError, match="host 'a': it needs a name of its own"):
        replace(daemon.config, host="a", ahead=("a", "b"))


# -- files that are none


def drop_file(path: Path) -> None:
    path.write_bytes(b"\xff\xfe half written")


def drop_directory(path: Path) -> None:
    path.mkdir()


def drop_nothing(path: Path) -> None:
    path.write_bytes(b"")


def drop_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def drop_unreadable(path: Path) -> None:
    path.write_text("site works")
    path.chmod(0)


DROPS = [drop_file, drop_directory, drop_nothing, drop_dangling_link]
#: Who is root may read everything.
DROPS += [drop_unreadable] if os.geteuid() else []


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("name", ["downtime", "proxy.pem", "manifest.json"])
def test_no_file_ends_the_frontend(name: str, drop: object) -> None:
    from pilotbed.daemon import NotReady

    pool = Pool([global_offer(), offer("alpha"), SCHEDD], [WAITING])
    with frontend(pool) as daemon:
        path = daemon.config.status.with_name(name)
        path.unlink(missing_ok=True)
        drop(path)  # type: ignore[operator]
        if name == "manifest.json":
            with pytest.raises(NotReady, match=r"manifest\.json"):
                daemon.turn()
        else:
            daemon.turn()
            assert not asked(pool)
        assert daemon.errors == 0


# -- the factory

SIGNED = Signed("description.cfg", "ab" * 32)
STAGE = ClientStage("http://frontend.test/stage", "sha256", SIGNED, SIGNED, "http://frontend.test/stage/group_main")
SESSION = SessionKey.new()
CREDENTIAL = credential_id(Path("/p.pem"), "/CN=pilot")


def seal(values: dict[str, str]) -> Sealed:
    return Sealed.seal(SESSION, SESSION.wrapped(KEY.public_pem), KEY.key_id, FRONTEND_ID, values)


def request(entry: str, idle: int = 2) -> Ad:
    sealed = seal({"SecurityName": "vo", "SecurityClass": "pilot", "SubmitProxy": CREDENTIAL})
    one = Request(FACTORY.entry(entry), CLIENT, CREDENTIAL, idle, 10, Removal.NO, 0, 3600, STAGE,
                  {"GLIDEIN_Collector": "central:9618"}, sealed, {"Idle": 3})  # fmt: skip
    return one.to_ad() | {"AuthenticatedIdentity": FRONTEND_ID}


def credentials(proxy: str, client: Client = CLIENT) -> Ad:
    values = Credentials.values("vo", {CREDENTIAL: ("pilot", proxy)})
    return Credentials(str(FACTORY), client, seal(values)).to_ad() | {"AuthenticatedIdentity": FRONTEND_ID}


PILOT: Ad = {
    "ClusterId": 7, "ProcId": 0, "JobStatus": 1, "GridJobStatus": "QUEUING", "GridJobId": "arc https://127.0.0.1:9 y",
    "GlideinFactory": "factory", "GlideinName": "v1", "GlideinEntryName": "beta", "GlideinClient": "vo.main",
    "GlideinFrontendName": "vo:pilot", "GlideinCredentialIdentifier": CREDENTIAL,
    "EnteredCurrentStatus": 1_700_000_000, "NumHolds": 0, "HoldReason": "", "GlideinProxyEnds": 2**40,
}  # fmt: skip


@contextmanager
def factory(pool: Pool) -> Iterator[Factory]:
    with place() as directory, pool.installed("pilotbed.factory.daemon"), mock.patch.object(
        FactoryKey, "generate", lambda: KEY
    ):  # fmt: skip
        for name in ("credentials", "downtime", "renewed"):
            (directory / name).mkdir()
        manifest(directory / "manifest.json", entries=["alpha", "beta"])
        entry = Entry("arc", "https://ce.test:443/arex/rest/1.0", "grid", limits=Limits(max_idle=1000))
        yield Factory(
            FactoryConfig("factory", "v1", "collector", {"vo": Client_(FRONTEND_ID, ("pilot",))},
                          {"alpha": entry, "beta": entry}, Stage("http://factory.test/stage"), directory=directory,
                          renewed=directory / "renewed", manifest=directory / "manifest.json",
                          status=directory / "state.json", stale_idle=2**40, stale_running=2**40)
        )  # fmt: skip


def queued(pool: Pool, entry: str = "alpha") -> int:
    return sum(count for description, count in pool.submitted if f'MY.GlideinEntryName = "{entry}"' in description)


SPOILT_FOR_FACTORY = st.one_of(
    spoilt(request("beta"), ("ReqRemoveExcess", "GlideinParamX")).map(lambda ad: Spoilt("ad", ad)),
    st.just(None).flatmap(lambda _: spoilt(credentials("x", Client("vo", "other")))).map(lambda ad: Spoilt("ad", ad)),
    spoilt(PILOT, Pilot.ATTRIBUTES).map(lambda ad: Spoilt("pilot", ad)),
)


@FEW
@given(st.lists(SPOILT_FOR_FACTORY, min_size=1, max_size=3))
def test_whatever_an_ad_says_the_factory_serves_the_other_requests(wrong: list[Spoilt]) -> None:
    ads = [credentials(pilot_proxy()), request("alpha"), *(one.ad for one in wrong if one.kind == "ad")]
    pool = Pool(ads, [one.ad for one in wrong if one.kind == "pilot"])
    with factory(pool) as daemon:
        daemon.turn()
        daemon.turn()
        assert daemon.errors == 0, daemon.said
        assert queued(pool) == 4  # two a turn: the pool queues none of them
        assert not [jobs for action, jobs in pool.acted if action == "remove" and jobs != ("7.0",)]
        assert state(daemon)["error"] == ""


#: Without the schedd's own there is no job.
@pytest.mark.parametrize("name", sorted({*Pilot.ATTRIBUTES} - {"ClusterId", "ProcId", "JobStatus"}))
@pytest.mark.parametrize("value", ABSURD)
def test_an_odd_pilot_is_still_a_pilot(name: str, value: str) -> None:
    """Who does not count it submits one more, turn for turn."""
    notes: list[str] = []
    pool = Pool(jobs=[PILOT | {name: Expr(value)}])
    (ad,) = pool.query("true", Pilot.ATTRIBUTES, pool.jobs)
    pilot = Pilot.from_job(ad, notes)
    assert pilot is not None and pilot.job == "7.0"


DOWNTIMES = [
    ("alpha", b"power cut", "power cut"),
    ("alpha", b"", "no reason given"),
    ("alpha", b"\xff\xfe", "is not UTF-8 text"),
    ("alpha", None, "Is a directory"),
    ("ALL", b"move\nof the hall", "move"),
    ("vo:pilot", b"ban", "ban"),
    ("alpha~", b"power cut", ""),
    (".alpha.swp", b"\0\xff", ""),
    ("#alpha#", None, ""),
    ("alhpa", b"power cut", ""),
]


@pytest.mark.parametrize(("name", "content", "reason"), DOWNTIMES)
def test_a_downtime_holds_whatever_its_file_is_and_an_editors_file_is_none(
    name: str, content: bytes | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pool = Pool([credentials(pilot_proxy()), request("alpha")])
    with factory(pool) as daemon:
        path = daemon.config.directory / "downtime" / name
        path.mkdir() if content is None else path.write_bytes(content)
        daemon.turn()
        daemon.turn()
        assert queued(pool) == (0 if reason else 4)
        assert reason in str(daemon.entries["alpha"]["why"])
        assert state(daemon)["absurd"] == ({} if reason else {"downtimes_left_out": 1})
    assert caplog.text.count("no entry") == (0 if reason else 1)


def test_downtimes_that_cannot_be_read_are_downtimes() -> None:
    pool = Pool([credentials(pilot_proxy()), request("alpha")])
    with factory(pool) as daemon:
        directory = daemon.config.directory / "downtime"
        directory.rmdir()
        directory.write_text("a file")
        daemon.turn()
        assert queued(pool) == 0
        assert "Not a directory" in str(daemon.entries["alpha"]["why"])


@pytest.mark.parametrize("drop", DROPS)
def test_what_lies_where_the_renewal_leaves_proxies_ends_nothing(drop: object) -> None:
    pool = Pool([credentials(pilot_proxy()), request("alpha")])
    with factory(pool) as daemon:
        drop(daemon.config.renewed / f"vo,pilot,vo.main,{CREDENTIAL}.pem")  # type: ignore[operator]
        drop(daemon.config.directory / "credentials" / "vo,pilot,vo.main,X.pem")  # type: ignore[operator]
        daemon.turn()
        daemon.turn()
        assert queued(pool) == 4
        assert daemon.errors == 0


def test_a_stored_proxy_that_is_none_is_replaced() -> None:
    pool = Pool([credentials(pilot_proxy()), request("alpha")])
    with factory(pool) as daemon:
        path = daemon.config.directory / "credentials" / f"vo,pilot,vo.main,{CREDENTIAL}.pem"
        drop_file(path)
        daemon.turn()
        assert path.read_text() == pilot_proxy()
        assert queued(pool) == 2


def test_one_proxy_that_is_none_does_not_keep_the_others_from_being_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pilotbed.factory import renew

    caplog.set_level(logging.INFO)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("")
    drop_file(tmp_path / "pilots_vo,pilot,vo.main,a.pem")
    drop_directory(tmp_path / "pilots_vo,pilot,vo.main,b.pem")
    (tmp_path / "pilots_vo,pilot,vo.main,c.pem").write_text(pilot_proxy())
    assert renew.main(["--myproxy", "localhost", "--voms", "pilot=vo:/vo", "--out", str(tmp_path)]) == 1
    assert [line.split()[0] for line in caplog.messages] == ["renewal-failed", "renewal-failed", "fresh"]
    assert "is not UTF-8 text" in caplog.messages[0]


def test_a_defect_in_one_request_is_its_own_affair(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool([credentials(pilot_proxy()), request("alpha"), request("beta")])
    with factory(pool) as daemon:
        real = daemon.submission.arguments

        def fail(entry: Entry, trusted: object, stage: object) -> list[str]:
            if trusted.request.entry_short == "alpha":  # type: ignore[attr-defined]
                raise ZeroDivisionError("a defect")
            return real(entry, trusted, stage)  # type: ignore[arg-type]

        with mock.patch("pilotbed.factory.submission.Submission.arguments", side_effect=fail):
            daemon.turn()
            daemon.turn()
        assert queued(pool, "beta") == 4
        assert daemon.errors == 2
        assert pool.told(Kind.OFFER.my_type)  # what comes after it in the turn is done
    assert caplog.text.count("Traceback") == 1


# -- both, and a view that was lost

RUNNING = 40


def frontends_word(jobs: list[Ad], turns: int) -> list[Ad]:
    """Return what a frontend sends after so many turns in which it sees these jobs, and no slot at all."""
    pool = Pool([global_offer(), offer("alpha"), SCHEDD], jobs)
    with frontend(pool) as daemon:
        for _ in range(turns):
            pool.sent.clear()
            daemon.turn()
    kinds = (Kind.REQUEST.my_type, Kind.CREDENTIALS.my_type)
    return [ad | {"AuthenticatedIdentity": FRONTEND_ID} for kind in kinds for ad in pool.told(kind).values()]


def removed(ads: list[Ad]) -> int:
    """Return how many of RUNNING pilots a factory that gets ``ads`` removes in ten turns."""
    (request,) = [ad for ad in ads if ad["GlideinMyType"] == Kind.REQUEST.my_type]
    name = str(request["Name"]).partition("_")[0]
    alive = {"GlideinEntryName": "alpha", "JobStatus": 2, "GridJobStatus": "INLRMS:R"}
    mine = PILOT | alive | {"GlideinCredentialIdentifier": name}
    pool = Pool(ads, [mine | {"ProcId": number} for number in range(RUNNING)])
    with factory(pool) as daemon:
        for _ in range(10):
            daemon.turn()
    return len({job for action, jobs in pool.acted if action == "remove" for job in jobs})


@pytest.mark.parametrize("where", [{"MachineAttrGLIDEIN_Entry_Name0": "alpha"}, {}])
@pytest.mark.parametrize("turns", [6, 11, 30])
def test_forty_pilots_that_are_out_of_sight_go_on(where: Ad, turns: int) -> None:
    """A site's uplink, the collector or the frontend was down, or is: 40 jobs run, their slots are unseen."""
    jobs = [job(number, JobStatus=2, RemoteHost=f"slot1@{number}", **where) for number in range(RUNNING)]
    assert removed(frontends_word(jobs, turns)) == 0


def test_pilots_for_which_nothing_waits_and_where_nothing_runs_are_let_go() -> None:
    """The control: it is the running jobs that keep the pilots."""
    assert removed(frontends_word([], 30)) > 0


# -- the door


@pytest.mark.parametrize(
    ("value", "found"),
    [(4, 4), ("4", 4), (" 7 ", 7), (1.2, 2), (0, 0), (2**70, LARGEST), (float("inf"), LARGEST), ("9" * 5000, LARGEST)],
)
def test_a_number_is_a_number(value: Value, found: int) -> None:
    assert number({"X": value}, "X") == found


@pytest.mark.parametrize("value", ["four", "", "-1", "1.5", "\N{ARABIC-INDIC DIGIT THREE}", True, -1, float("nan"),
                                   Expr("{ 1 }"), Expr("x", open=True)])  # fmt: skip
def test_what_is_no_number_is_refused_or_replaced_and_noted(value: Value) -> None:
    with pytest.raises(AbsurdValue, match=r"^X is "):
        number({"X": value}, "X")
    notes: list[str] = []
    assert number({"X": value}, "X", 3, notes=notes) == 3
    # What only a match gives a value is not absurd.
    assert len(notes) == (0 if isinstance(value, Expr) and value.open else 1)


def test_what_a_classad_cannot_hold_is_brought_near_to_it() -> None:
    """Out of 64 bits the library raises SystemError; a lone surrogate crashes the process when the ad is printed."""
    made = classad({"big": 2**70, "small": -(2**70), "text": "x\ud800", "list": Expr('{ "a" }'), "true": True})
    assert plain(made) == {
        "big": 2**63 - 1, "small": -(2**63), "text": "x?", "list": Expr('{ "a" }'), "true": True,
    }  # fmt: skip
    assert str(made)


def test_a_message_is_one_short_line() -> None:
    with pytest.raises(AbsurdValue) as caught:
        number({"X": "a\n\x1b[31m" + "x" * 5000}, "X")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 120
    with pytest.raises(AbsurdValue, match="X is missing"):
        text({}, "X")
