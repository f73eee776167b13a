"""What the factory believes, how many pilots it queues, and what it does with the broken ones."""

from __future__ import annotations

import base64
import datetime as dt
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pki
import pytest
from pilotbed.factory.config import Config, Entry, Frontend, Limits
from pilotbed.factory.credentials import Store, better
from pilotbed.factory.decisions import Care, Patience, Pilot, manage, state_of, tend
from pilotbed.factory.states import State
from pilotbed.factory.submission import Submission
from pilotbed.factory.tokens import Token
from pilotbed.factory.trust import CredentialName, Refusal, Rules, Trusted, check_credentials, check_request
from pilotbed.pool.values import Ad
from pilotbed.protocol.ads import Client, ClientStage, Credentials, FactoryName, Removal, Request, Sealed
from pilotbed.protocol.crypto import FactoryKey, SessionKey
from pilotbed.protocol.manifest import Signed, Stage
from pilotbed.proxy import Proxy, ProxyError
from pilotbed.settings import SettingsError, load
from pilotbed.x509.chain import make_proxy

FACTORY = FactoryName("v1", "factory")
CLIENT = Client("vo", "main")
CREDENTIAL = CredentialName("vo", "pilot", "vo.main", "K6X3URBI")
SIGNED = Signed("description.cfg", "ab" * 32)
STAGE = ClientStage("http://frontend.test/stage", "sha256", SIGNED, SIGNED, "http://frontend.test/stage/group_main")
ALPHA = Entry("arc", "https://ce.test:443/arex/rest/1.0", "grid", parameters={"SITE_KNOB": "1"})
ME = "frontend@grid.test"
GRID_PROXY = {"SecurityName": "vo", "SecurityClass": "pilot", "SubmitProxy": "K6X3URBI"}
KEY = FactoryKey.generate()
SESSION = SessionKey.new()
RULES = Rules(
    name=FACTORY,
    key=KEY,
    frontends={"vo": Frontend(ME, ("pilot", "production")), "other": Frontend("other@grid.test", ("pilot",))},
    entries={"alpha": ALPHA},
    parameters={"GLIDEIN_Collector": ""},
)


def seal(values: Mapping[str, str], identity: str = ME, key: FactoryKey = KEY) -> Sealed:
    return Sealed.seal(SESSION, SESSION.wrapped(key.public_pem), key.key_id, identity, values)


def request(idle: int = 2, maximum: int = 10, removal: Removal = Removal.NO, margin: int = 0) -> Request:
    parameters = {"GLIDEIN_Collector": "central:9618", "SITE_KNOB": "2", "LD_PRELOAD": "/tmp/x.so"}
    sealed = seal(GRID_PROXY)
    return Request(
        "alpha@v1@factory", CLIENT, "K6X3URBI", idle, maximum, removal, margin, 3600, STAGE, parameters, sealed
    )


def ad(changes: Mapping[str, str | int] | None = None, sealed: Sealed | None = None, sender: str = ME) -> Ad:
    made = replace(request(), sealed=sealed or seal(GRID_PROXY)).to_ad()
    return made | {"AuthenticatedIdentity": sender} | dict(changes or {})


def believe(one: Ad, downtimes: Mapping[str, str] | None = None, rules: Rules = RULES) -> Trusted:
    return check_request(one, rules, {CREDENTIAL}, downtimes or {})


def jwt(claims: object = None, text: str = "") -> str:
    """Return a token with these claims."""
    parts = json.dumps({"alg": "HS256"}), text or json.dumps(claims), "signature"
    return ".".join(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts)


# -- trust: each check has the request that fails it, and the same one passes without that flaw


def test_a_good_request_is_believed() -> None:
    trusted = believe(ad())
    assert trusted.credential == CREDENTIAL
    assert trusted.security == "vo:pilot"
    assert trusted.closed_why == ""


def test_only_parameters_that_the_entry_offers_can_be_set() -> None:
    assert believe(ad()).parameters == {"GLIDEIN_Collector": "central:9618", "SITE_KNOB": "2"}


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (ad({"ReqGlidein": "gamma@v1@factory", "Name": "K_gamma@v1@factory@vo.main"}), "not an entry of this factory"),
        (ad({"ReqGlidein": "alpha@v2@factory", "Name": "K_alpha@v2@factory@vo.main"}), "not an entry of this factory"),
        (ad({"WebSignType": "md5"}), "WebSignType md5"),
        (ad(sealed=seal(GRID_PROXY, key=FactoryKey.generate())), "not this factory's key"),
        (ad({"ReqEncKeyCode": "00" * 256}), "cannot be decrypted"),
        (ad({"ReqEncIdentity": "00" * 16}), "ReqEncIdentity cannot be decrypted"),
        (ad({"GlideinEncParamSecurityName": "00" * 16}), "GlideinEncParamSecurityName cannot be decrypted"),
        (ad(sender="mallory@grid.test"), "is not the sender's"),
        (ad(sealed=seal(GRID_PROXY, identity="root@grid.test")), "is not the sender's"),
        (ad({"AuthenticatedIdentity": ""}, sealed=seal(GRID_PROXY, identity="")), "unauthenticated"),
        (ad(sealed=seal(GRID_PROXY | {"SecurityName": "nobody"})), "nobody is not configured"),
        (ad(sealed=seal(GRID_PROXY | {"SecurityName": "other"})), "belongs to other@grid.test"),
        (ad(sealed=seal(GRID_PROXY | {"SecurityClass": "root"})), "not one of vo's"),
        (ad(sealed=seal(GRID_PROXY | {"SubmitProxy": "../../etc"})), "credential id"),
        (ad(sealed=seal(GRID_PROXY | {"SubmitProxy": "OTHER"})), "was not sent"),
        (ad(sealed=seal({"SecurityName": "vo", "SecurityClass": "pilot"})), "grid_proxy needs SubmitProxy"),
    ],
)  # fmt: skip
def test_a_request_that_fails_a_check_is_refused(one: Ad, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        believe(one)


IDTOKEN = jwt({"sub": "vo@grid.test", "exp": 2_000_000_000})


def test_tokens_that_come_with_a_request_are_taken() -> None:
    """glideinWMS 3.10's frontend adds them where it has any; a factory that wanted neither lost the whole request."""
    added = {"alpha.idtoken": f"{IDTOKEN}\n", "frontend_scitoken": jwt({"sub": "x"})}
    trusted = believe(ad(sealed=seal(GRID_PROXY | added)))
    assert [(token.kind, token.text, token.ends) for token in trusted.tokens] == [
        ("idtoken", IDTOKEN, 2_000_000_000), ("scitoken", jwt({"sub": "x"}), None)
    ]  # fmt: skip
    assert trusted.left_out == {}
    assert IDTOKEN not in repr(trusted)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("Password", "x", "knows no such parameter"),
        ("beta.idtoken", IDTOKEN, "knows no such parameter"),
        ("frontend_condortoken", IDTOKEN, "knows no such parameter"),
        ("alpha.idtoken", "", "is not a token"),
        ("alpha.idtoken", "a.b", "is not a token"),
        ("alpha.idtoken", f"{IDTOKEN}\nX = 1", "is not a token"),
        ("alpha.idtoken", "a.b.c", "not a JSON object"),
        ("alpha.idtoken", jwt([1]), "not a JSON object"),
        ("alpha.idtoken", jwt({"exp": "never"}), "exp is not a number"),
        ("alpha.idtoken", jwt({"exp": True}), "exp is not a number"),
        ("alpha.idtoken", jwt(text="[" * 9000), "not a JSON object"),
        ("alpha.idtoken", jwt({"x": "x" * 20000}), "16384 are the most"),
    ],
)
def test_an_addition_that_is_no_good_costs_itself_only(name: str, value: str, why: str) -> None:
    good = {"frontend_scitoken": jwt({"sub": "x"})}
    trusted = believe(ad(sealed=seal(GRID_PROXY | good | {name: value})))
    assert [token.kind for token in trusted.tokens] == ["scitoken"]
    assert set(trusted.left_out) == {name}
    assert why in trusted.left_out[name]
    assert not value or value not in trusted.left_out[name]


def test_no_token_goes_where_the_computing_element_takes_no_files() -> None:
    gram = replace(ALPHA, gridtype="batch", gatekeeper="ce:2119/jobmanager-batch")
    rules = replace(RULES, entries={"alpha": gram})
    trusted = believe(ad(sealed=seal(GRID_PROXY | {"alpha.idtoken": IDTOKEN})), rules=rules)
    assert trusted.tokens == ()
    assert "takes no file" in trusted.left_out["alpha.idtoken"]


def test_a_token_is_kept_for_its_owner_only(tmp_path: Path) -> None:
    token = Token.read("idtoken", IDTOKEN)
    path = token.keep(tmp_path / "vo" / "alpha")
    assert (path.read_text(), path.stat().st_mode & 0o777) == (f"{IDTOKEN}\n", 0o600)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert (token.expired(1_999_999_999), token.expired(2_000_000_000)) == (False, True)


def test_another_class_does_not_get_this_class_credential() -> None:
    with pytest.raises(Refusal, match="was not sent"):
        believe(ad(sealed=seal(GRID_PROXY | {"SecurityClass": "production"})))


@pytest.mark.parametrize("name", ["ALL", "alpha", "vo:pilot"])
def test_a_downtime_closes_the_entry(name: str) -> None:
    assert believe(ad(), {name: "disk"}).closed_why == f"downtime of {name}: disk"
    assert believe(ad(), {"beta": "disk", "vo:production": "x"}).closed_why == ""


@pytest.mark.parametrize(("allowed", "closed"), [(("vo",), False), (("vo:pilot",), False), (("vo:production",), True)])
def test_an_entry_may_be_for_some_only(allowed: tuple[str, ...], closed: bool) -> None:
    rules = replace(RULES, entries={"alpha": replace(ALPHA, allow_frontends=allowed)})
    assert bool(believe(ad(), rules=rules).closed_why) == closed


# -- credentials


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> pki.Authority:
    return pki.Authority(tmp_path_factory.mktemp("certificates"))


def proxy(authority: pki.Authority, name: str = "pilot", hours: float = 12) -> str:
    person = authority.issue(f"/DC=test/DC=grid/O=Gridlab/OU=Services/CN={name}")
    return make_proxy(person, dt.timedelta(hours=hours)).pem().decode()


def global_ad(values: Mapping[str, str], sender: str = ME, factory: str = str(FACTORY)) -> Ad:
    return Credentials(factory, CLIENT, seal(values)).to_ad() | {"AuthenticatedIdentity": sender}


def test_credentials_are_taken_from_their_frontend(authority: pki.Authority) -> None:
    pem = proxy(authority)
    values = Credentials.values("vo", {"K6X3URBI": ("pilot", pem)})
    assert check_credentials(global_ad(values), RULES) == {CREDENTIAL: pem}
    for sender, message in (("mallory@grid.test", "is not the sender's"), ("", "unauthenticated")):
        with pytest.raises(Refusal, match=message):
            check_credentials(global_ad(values, sender), RULES)
    with pytest.raises(Refusal, match="not for this factory"):
        check_credentials(global_ad(values, factory="v1@elsewhere"), RULES)
    with pytest.raises(Refusal, match="belongs to other"):
        check_credentials(global_ad(values | {"SecurityName": "other"}), RULES)
    with pytest.raises(Refusal, match="not one of vo's"):
        check_credentials(global_ad(values | {"SecurityClassK6X3URBI": "root"}), RULES)


def test_what_is_no_proxy_is_refused(authority: pki.Authority) -> None:
    person = authority.issue("/DC=test/DC=grid/O=Gridlab/OU=Services/CN=pilot")
    limited = make_proxy(person, dt.timedelta(hours=1), "limited").pem().decode()
    key_only = proxy(authority).partition("-----BEGIN CERTIFICATE")[0]
    for content, message in (
        ("cos\nsystem\n(S'id'\ntR.", "no unencrypted private key"),
        (person.pem().decode(), "long-lived credential"),
        (limited, "limited proxy"),
        (key_only + "-----BEGIN PRIVATE KEY-----", "not a proxy file"),
        (person.chain.pem().decode(), "no unencrypted private key"),
    ):
        with pytest.raises(Refusal, match=message):
            check_credentials(global_ad(Credentials.values("vo", {"K6X3URBI": ("pilot", content)})), RULES)


def test_the_store_keeps_what_lives_longer_and_is_the_same_persons(authority: pki.Authority, tmp_path: Path) -> None:
    store = Store(tmp_path)
    now = dt.datetime.now(dt.UTC).timestamp()
    short, long, other = proxy(authority, hours=6), proxy(authority, hours=12), proxy(authority, "mallory", hours=24)
    assert store.keep(CREDENTIAL, short, now)[1] == ""
    assert store.keep(CREDENTIAL, long, now)[1] == ""
    assert store.path(CREDENTIAL).read_text() == long
    assert store.path(CREDENTIAL).stat().st_mode & 0o777 == 0o600
    assert store.keep(CREDENTIAL, long, now)[1] == "same"
    assert store.keep(CREDENTIAL, short, now)[1] == "the stored one lives as long"
    assert "mallory" in store.keep(CREDENTIAL, other, now)[1]
    assert store.path(CREDENTIAL).read_text() == long
    assert [*store.read()] == [CREDENTIAL]
    with pytest.raises(ProxyError):
        store.keep(CREDENTIAL, "nothing", now)


def test_an_expired_proxy_replaces_nothing() -> None:
    assert better(None, Proxy("/CN=pilot", 1000), now=1001) == "it has expired"
    assert better(None, Proxy("/CN=pilot", 1000), now=999) == ""


def test_names_of_credential_files_do_not_meet() -> None:
    assert CredentialName.parse(CREDENTIAL.filename) == CREDENTIAL
    assert CredentialName.parse("x.pem") is None
    assert CredentialName.parse(".vo,pilot,vo.main,K.pem.new") is None


# -- how many


def pilots(count: int, state: State, **changes: object) -> list[Pilot]:
    base = Pilot("", "alpha", "vo.main", "vo:pilot", "K6X3URBI", state, 0)
    return [replace(base, job=f"{state.value}.{i}", **changes) for i in range(count)]  # type: ignore[arg-type]


def submit(
    trusted: list[Trusted], queue: list[Pilot], limits: Limits | None = None, left: int = 86400
) -> list[tuple[int, str]]:
    entry = replace(ALPHA, limits=limits or Limits())
    decisions = manage(trusted, {"alpha": entry}, queue, {CREDENTIAL: left}, 3600)
    return [(decision.submit, decision.why) for decision in decisions]


def trusted(**changes: int) -> Trusted:
    return Trusted(request(**changes), CREDENTIAL, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("idle", "maximum", "queued", "running", "expected"),
    [
        (2, 10, 0, 0, 2),  # nothing there yet
        (2, 10, 1, 5, 1),  # running pilots do not count against idle
        (2, 10, 2, 0, 0),  # enough
        (2, 10, 4, 0, 0),  # more than enough
        (2, 5, 0, 4, 1),  # the maximum bites
        (2, 5, 0, 5, 0),
        (2, 5, 1, 7, 0),
        (0, 0, 0, 0, 0),
    ],
)
def test_pilots_are_queued_up_to_the_request(idle: int, maximum: int, queued: int, running: int, expected: int) -> None:
    queue = pilots(queued, State.PENDING) + pilots(running, State.RUNNING)
    assert submit([trusted(idle=idle, maximum=maximum)], queue)[0][0] == expected


@pytest.mark.parametrize(
    ("limits", "queue", "expected", "limit"),
    [
        (Limits(max_idle=3), pilots(2, State.PENDING, client="x.y", security="x:z"), 1, "max_idle"),
        (Limits(max_pilots=6), pilots(6, State.RUNNING, client="x.y", security="x:z"), 0, "max_pilots"),
        (Limits(class_max_idle=4), pilots(2, State.PENDING, client="vo.other"), 2, "class_max_idle"),
        (Limits(class_max_pilots=4), pilots(3, State.RUNNING, client="vo.other"), 1, "class_max_pilots"),
        (Limits(submit_per_turn=2), [], 2, "submit_per_turn"),
        (Limits(max_held=1), pilots(1, State.HELD, client="x.y", security="x:z"), 0, "max_held"),
        (Limits(class_max_held=2), pilots(2, State.HELD, client="vo.other"), 0, "class_max_held"),
    ],
)
def test_each_limit_is_kept_and_named(limits: Limits, queue: list[Pilot], expected: int, limit: str) -> None:
    ((count, why),) = submit([trusted(idle=5, maximum=50)], queue, limits)
    assert count == expected
    assert limit in why


def test_two_requests_of_one_turn_keep_a_limit_together() -> None:
    """glideinWMS issue 397: each request alone kept the limit, both together passed it."""
    other = Trusted(replace(request(idle=5, maximum=50), client=Client("vo", "other")), CREDENTIAL, {})
    counts = [count for count, _ in submit([trusted(idle=5, maximum=50), other], [], Limits(max_idle=7))]
    assert counts == [5, 2]


def test_a_credential_that_ends_soon_submits_nothing() -> None:
    assert submit([trusted()], [], left=3600)[0][0] == 2
    assert submit([trusted()], [], left=3599) == [(0, "credential lives only 3599 s more (least 3600 s)")]


def test_a_closed_entry_gets_nothing_new() -> None:
    closed = replace(trusted(), closed_why="downtime of alpha: disk")
    assert submit([closed], []) == [(0, "downtime of alpha: disk")]


@pytest.mark.parametrize(
    ("removal", "idle", "maximum", "margin", "removed"),
    [
        (Removal.NO, 0, 0, 0, []),
        (Removal.WAIT, 0, 0, 0, ["1001.0", "1001.1"]),
        (Removal.WAIT, 3, 9, 0, ["1001.0"]),
        (Removal.WAIT, 2, 9, 1, ["1001.0"]),
        (Removal.IDLE, 0, 0, 0, ["1001.0", "1001.1", "1002.0", "1002.1"]),
        # Those that the CE has taken may be the three that are wanted.
        (Removal.IDLE, 0, 3, 0, ["1001.0", "1001.1"]),
        (Removal.IDLE, 0, 2, 0, ["1001.0", "1001.1", "1002.0"]),
        (Removal.ALL, 0, 0, 0, ["1001.0", "1001.1", "1002.0", "1002.1", "2.0", "5.0"]),
        (Removal.ALL, 0, 1, 0, ["1001.0", "1001.1", "1002.0", "1002.1", "5.0"]),
    ],
)
def test_excess_goes_as_far_as_the_request_allows(
    removal: Removal, idle: int, maximum: int, margin: int, removed: list[str]
) -> None:
    states = [(2, State.UNSUBMITTED), (2, State.PENDING), (1, State.RUNNING), (1, State.HELD)]
    queue = [pilot for count, state in states for pilot in pilots(count, state)]
    queue += pilots(3, State.UNSUBMITTED, client="somebody.else")
    one = Trusted(request(idle, maximum, removal, margin), CREDENTIAL, {})
    entry = replace(ALPHA, limits=Limits(remove_per_turn=10))
    (decision,) = manage([one], {"alpha": entry}, queue, {CREDENTIAL: 86400}, 3600)
    assert list(decision.remove) == removed
    (few,) = manage([one], {"alpha": ALPHA}, queue, {CREDENTIAL: 86400}, 3600)
    assert list(few.remove) == removed[:5]


# -- states, held and stale pilots


@pytest.mark.parametrize(
    ("status", "grid_status", "grid_id", "state"),
    [
        (1, "", "", State.UNSUBMITTED),
        (1, "", "arc https://ce/rest", State.UNSUBMITTED),
        (1, "", "arc https://ce/rest - 0a1b", State.OTHER),
        (1, "ACCEPTED", "arc https://ce/rest - 0a1b", State.STAGE_IN),
        (1, "QUEUING", "arc https://ce/rest - 0a1b", State.PENDING),
        (1, "INLRMS:Q", "arc https://ce/rest - 0a1b", State.PENDING),
        (1, "RUNNING", "arc https://ce/rest - 0a1b", State.RUNNING),
        (1, "OTHER", "arc https://ce/rest - 0a1b", State.OTHER),
        (2, "RUNNING", "arc https://ce/rest - 0a1b", State.RUNNING),
        (2, "FINISHED", "arc https://ce/rest - 0a1b", State.STAGE_OUT),
        (1, "RUNNING", "nosuch https://ce/rest - 0a1b", State.OTHER),
        (2, "FINISHED", "nosuch https://ce/rest - 0a1b", State.RUNNING),
        (6, "", "x", State.STAGE_OUT),
        (5, "RUNNING", "x", State.HELD),
        (3, "", "", None),
        (4, "", "", None),
    ],
)
def test_a_pilot_is_in_the_state_that_its_ce_reports(
    status: int, grid_status: str, grid_id: str, state: State | None
) -> None:
    assert state_of(status, grid_status, grid_id) is state


PATIENCE = Patience(("SSL connect error",), hold_wait=300, max_releases=10, stale_idle=1000, stale_running=5000)


@pytest.mark.parametrize(
    ("state", "age", "holds", "reason", "care"),
    [
        (State.HELD, 299, 1, "SSL connect error", ""),
        (State.HELD, 300, 1, "SSL connect error", "release"),
        (State.HELD, 599, 2, "SSL connect error", ""),
        (State.HELD, 600, 2, "SSL connect error", "release"),
        (State.HELD, 9999, 11, "SSL connect error", "remove"),
        (State.HELD, 0, 1, "ARC job has no credentials", "remove"),
        (State.HELD, 0, 21, "ARC job has no credentials", "force"),
        (State.PENDING, 1000, 0, "", ""),
        (State.PENDING, 1001, 0, "", "remove"),
        (State.RUNNING, 5000, 0, "", ""),
        (State.RUNNING, 5001, 0, "", "remove"),
    ],
)
def test_held_and_stale_pilots_are_cared_for(state: State, age: int, holds: int, reason: str, care: str) -> None:
    queue = pilots(1, state, since=10000 - age, holds=holds, hold_reason=reason)
    expected = {name: ((queue[0].job,) if name == care else ()) for name in ("release", "remove", "force")}
    assert tend(ALPHA, queue, PATIENCE, now=10000) == Care(**expected)


def test_only_a_few_pilots_are_removed_at_a_time() -> None:
    assert len(tend(ALPHA, pilots(9, State.HELD), PATIENCE, now=0).remove) == Limits().remove_per_turn


# -- the submit description


def test_the_submit_description_is_complete() -> None:
    submission = Submission(FACTORY, "factory.grid.test", Path("/usr/lib/start.sh"), "std")
    stage = Stage("http://factory.test/stage", "sha256", Signed("d.cfg", "m"), {"alpha": Signed("de.cfg", "e")})
    entry = replace(ALPHA, proxy="http://squid:3128")
    one = Trusted(request(), CREDENTIAL, {"GLIDEIN_Collector": "central:9618", "KNOB": 'a "$(b)" `c`'})
    words = submission.arguments(entry, one, stage)
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["-entry"] == "alpha"
    assert options["-clientname"] == "vo.main"
    assert (options["-sign"], options["-signentry"], options["-proxy"]) == ("m", "e", "http://squid:3128")
    assert options["-clientwebgroup"] == "http://frontend.test/stage/group_main"
    assert options["-param_GLIDEIN_Collector"] == "central.colon,9618"
    assert set(options["-param_KNOB"]).isdisjoint(set('"$() `'))
    text = submission.description(entry, one, words, Path("/c/proxy.pem"), 1.5e9, Path("/log"))
    lines = dict(line.split(" = ", 1) for line in text.splitlines())
    assert lines["grid_resource"] == "arc https://ce.test:443/arex/rest/1.0"
    assert lines["arc_resources"] == "<QueueName>grid</QueueName>"
    assert lines["x509userproxy"] == "/c/proxy.pem"
    assert lines["MY.GlideinFrontendName"] == '"vo:pilot"'
    assert "transfer_input_files" not in lines
    files = [Path("/t/pilot.idtoken"), Path("/t/pilot.scitoken")]
    text = submission.description(entry, one, words, Path("/c/proxy.pem"), 1.5e9, Path("/log"), files)
    assert "\ntransfer_input_files = /t/pilot.idtoken, /t/pilot.scitoken\n" in text


@pytest.mark.parametrize(
    ("status", "queued", "since", "removed"),
    [
        (1, 3700, 3700, True),  # it never started
        (1, 3500, 3500, False),
        (1, 7200, 60, False),  # it ran, was held while its CE could not be reached, and has been released
        (2, 90000, 86400 + 12 * 3600 - 60, False),
        (2, 200000, 86400 + 12 * 3600 + 60, True),
        (5, 90000, 90000, False),
    ],
)
def test_a_pilot_is_removed_by_its_schedd_after_its_time(status: int, queued: int, since: int, removed: bool) -> None:
    import classad2

    submission = Submission(FACTORY, "factory.grid.test", Path("/usr/lib/start.sh"), "std")
    one = Trusted(request(), CREDENTIAL, {})
    text = submission.description(ALPHA, one, [], Path("/c/proxy.pem"), 1.5e9, Path("/log"))
    (rule,) = [line.split(" = ", 1)[1] for line in text.splitlines() if line.startswith("periodic_remove")]
    now = int(time.time())
    job = classad2.ClassAd({"JobStatus": status, "QDate": now - queued, "EnteredCurrentStatus": now - since})
    assert classad2.ExprTree(rule).eval(job) is removed


# -- the configuration file

TOML = """
factory = "factory"
glidein = "v1"
collector = "factory:9618"
[stage]
web = "http://factory.grid.test/stage"
[frontends.vo]
identity = "frontend@grid.test"
classes = ["pilot"]
[entries.alpha]
gridtype = "arc"
gatekeeper = "https://ce:443/arex/rest/1.0"
queue = "grid"
[entries.alpha.limits]
max_idle = 3
"""


def test_a_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "factory.toml"
    path.write_text(TOML)
    config = load(path, Config)
    assert config.entries["alpha"].limits.max_idle == 3
    assert str(config.name) == "v1@factory"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_idle = 3", "max_idel = 3", "unknown key entries.alpha.limits.max_idel"),
        ("max_idle = 3", 'max_idle = "3"', "entries.alpha.limits.max_idle = '3' must be int"),
        ('queue = "grid"', "", "entries.alpha.queue is missing"),
        ('queue = "grid"', 'queue = "a</QueueName>"', "queue"),
        ('queue = "grid"', 'queue = "grid"\ntraversal = "relay"', "relays"),
        ('queue = "grid"', 'queue = "grid"\ntraversal = "tunnel"', "traversal"),
        ('queue = "grid"', 'queue = "grid"\ntraversal = "ccb,relay"', "relays"),
        ('queue = "grid"', 'queue = "grid"\ntraversal = "ccb,tunnel"', "traversal"),
        ('gridtype = "arc"', 'gridtype = "cream"', "gridtype 'cream' has no module"),
        ('gridtype = "arc"', 'gridtype = "../arc"', "gridtype"),
        ('queue = "grid"', 'queue = "grid"\nallow_frontends = ["vx"]', "vx is not under frontends"),
        ("https://ce:443/arex/rest/1.0", "ce", "gatekeeper"),
        ("[entries.alpha]", '[entries."al pha"]', "entries"),
        ('glidein = "v1"', 'glidein = "v1', "not TOML"),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "factory.toml"
    assert old in TOML
    path.write_text(TOML.replace(old, new))
    with pytest.raises(SettingsError, match=message) as caught:
        load(path, Config)
    assert str(path) in str(caught.value)
