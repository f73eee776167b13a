"""docs/protocol.md, row by row, from both sides: what we write is in its tables, and what we read fails as they say."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pki
import pytest
from pilotbed.factory.config import Entry, Frontend
from pilotbed.factory.decisions import Decision
from pilotbed.factory.trust import CredentialName, Refusal, Rules, Trusted, check_credentials, check_request
from pilotbed.frontend.decisions import Size
from pilotbed.pool.text import any_of
from pilotbed.pool.values import Ad, Expr, Value
from pilotbed.protocol import ProtocolError
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
    answer_ad,
    group_ad,
    resource_ad,
)
from pilotbed.protocol.crypto import FactoryKey, SessionKey
from pilotbed.protocol.manifest import Signed
from pilotbed.x509.chain import make_proxy
from pilotbed_suite import CHECKOUT
from test_protocol import throw_away_key

ME, FACTORY, CLIENT = "frontend@grid.test", FactoryName("v1", "factory"), Client("vo", "main")
KEY, SESSION = FactoryKey.generate(), SessionKey.new()
ALPHA = Entry("arc", "https://ce.test:443/arex/rest/1.0", "grid")
RULES = Rules(FACTORY, KEY, {"vo": Frontend(ME, ("pilot",))}, {"alpha": ALPHA}, {"GLIDEIN_Collector": ""})
CREDENTIAL = CredentialName("vo", "pilot", str(CLIENT), "ID")
SEALED = "GlideinEncParam"

#: What no attribute may be that has a type, as (type's first word, values).
ABSURD: dict[str, tuple[Value, ...]] = {
    "string": (Expr("error"), 7, True),
    "count": (Expr("error"), "many", -1, float("nan"), True),
}


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    kind: Kind
    attribute: str
    type: str
    missing: str
    absurd: str

    def matches(self, name: str) -> bool:
        return re.fullmatch(re.escape(self.attribute).replace(r"\*", ".*"), name) is not None


def rows() -> Iterator[Row]:
    text = (CHECKOUT / "docs/protocol.md").read_text()
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        for line in re.findall(r"^\| `.*", body, re.MULTILINE):
            attribute, kind, _, missing, absurd = (cell.strip() for cell in line.strip("|").split("|"))
            yield Row(Kind[{one.my_type: one.name for one in Kind}[title]], attribute.strip("`"), kind, missing, absurd)


ROWS = list(rows())


def sealed(values: dict[str, str]) -> Sealed:
    return Sealed.seal(SESSION, SESSION.wrapped(KEY.public_pem), KEY.key_id, ME, values)


@pytest.fixture(scope="module")
def ads(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, dict[str, Value]]:
    """One ad of each kind, as we write it."""
    authority = pki.Authority(tmp_path_factory.mktemp("ca"))
    proxy = make_proxy(authority.issue("/DC=test/O=Gridlab/CN=pilot"), dt.timedelta(hours=12)).pem().decode()
    signed = Signed("description.cfg", "ab" * 32)
    stage = ClientStage("http://vo.test/stage", "sha256", signed, signed, "http://vo.test/stage/group_main")
    offer = Offer(
        FACTORY, "alpha", {"GLIDEIN_Site": "alpha", "GLIDEIN_CPUS": 1, "GLIDEIN_REQUIRE_VOMS": True},
        {"GLIDEIN_Collector": ""}, False, KEY.public_pem, KEY.key_id, {"PerEntryMaxGlideins": 9},
        {"TotalStatusIdle": 2},
    )  # fmt: skip
    request = Request(
        "alpha@v1@factory", CLIENT, "ID", 2, 10, Removal.WAIT, 1, 3600, stage,
        {"GLIDEIN_Collector": "central:9618"},
        sealed({"SecurityName": "vo", "SecurityClass": "pilot", "SubmitProxy": "ID"}), {"Idle": 4},
    )  # fmt: skip
    credentials = Credentials(str(FACTORY), CLIENT, sealed(Credentials.values("vo", {"ID": ("pilot", proxy)})))
    decision = Decision(Trusted(request, CREDENTIAL, {}), 1, 0, 0, 1, (), "short of idle")
    return {
        Kind.GLOBAL_OFFER: GlobalOffer(FACTORY, KEY.public_pem, KEY.key_id).to_ad(),
        Kind.OFFER: offer.to_ad(),
        Kind.CREDENTIALS: credentials.to_ad(),
        Kind.REQUEST: request.to_ad(),
        Kind.ANSWER: answer_ad(FACTORY, "alpha", request, decision.monitor()),
        Kind.RESOURCE: resource_ad(
            Offer.from_ad(offer.to_ad()), CLIENT, {"JobsIdle": 4, "Why": "asked"}, decision.monitor()
        ),
        Kind.GROUP: group_ad(CLIENT, {
            "Jobs": "true", "Match": "true", "Schedds": "submit", "ScheddsClosed": "", "Stopped": "", "Entries": 1,
            "Turn": 5, "Host": "",
        }),
    }  # fmt: skip


#: How each kind is read by ours; None: by nobody.
READERS: dict[Kind, Callable[[Ad], Any] | None] = {
    Kind.GLOBAL_OFFER: GlobalOffer.from_ad,
    Kind.OFFER: Offer.from_ad,
    Kind.CREDENTIALS: lambda ad: check_credentials(ad, RULES),
    Kind.REQUEST: lambda ad: check_request(ad, RULES, {CREDENTIAL}, {}),
    Kind.ANSWER: None,
    Kind.RESOURCE: None,
    Kind.GROUP: None,
}


def read(kind: Kind, ad: dict[str, Value]) -> Any:
    """Return what is read of an ad, less what only repeats it."""
    reader = READERS[kind]
    assert reader
    found = reader(ad | {"AuthenticatedIdentity": ME})
    if kind is Kind.OFFER:
        return replace(found, attributes={})
    if kind is Kind.REQUEST:
        return replace(found, request=replace(found.request, sealed=Sealed("", "", "", {})))
    return found


def absurd(row: Row) -> tuple[Value, ...]:
    if "sealed" in row.type:
        return ("not hexadecimal", SESSION.encrypt("../../x") if "SubmitProxy" in row.attribute else "00" * 16, 7)
    if "of a boolean" in row.type:
        return Expr("error"), 7, "perhaps"
    word = "count" if "of a count" in row.type else row.type.split()[0].strip(":,")
    return ABSURD[word]


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.my_type)
def test_what_we_write_is_in_the_table_and_of_its_type(ads: dict[Kind, dict[str, Value]], kind: Kind) -> None:
    mine = [row for row in ROWS if row.kind is kind]
    for name, value in ads[kind].items():
        row = next((row for row in mine if row.matches(name)), None)
        assert row, f"{kind.my_type} {name} is not in docs/protocol.md"
        assert isinstance(value, bool) is False, f"{name}: glideinWMS writes booleans as strings"
        assert {str: "string", int: "count"}[type(value)] in row.type, (name, value)
    for row in mine:
        assert any(row.matches(name) for name in ads[kind]), f"nobody writes {kind.my_type} {row.attribute}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind.my_type}-{row.attribute}")
def test_what_is_missing_or_absurd_does_what_the_table_says(ads: dict[Kind, dict[str, Value]], row: Row) -> None:
    ad = ads[row.kind]
    name = next(name for name in ad if row.matches(name) and (row.attribute != "*" or name == "GLIDEIN_Site"))
    without = {other: value for other, value in ad.items() if other != name}
    tried = [(row.missing, without), *((row.absurd, ad | {name: value}) for value in absurd(row))]
    if READERS[row.kind] is None:
        assert {outcome for outcome, _ in tried} == {"not read"}
        return
    good = read(row.kind, ad)
    for outcome, changed in tried:
        value = changed.get(name)
        if outcome == "refused":
            with pytest.raises((ProtocolError, Refusal)):
                read(row.kind, changed)
        elif outcome == "not read":
            assert read(row.kind, changed) == good, value
        elif outcome == "left out":
            found = read(row.kind, changed)
            assert found == good if row.attribute == "*" else found != good, value
        elif outcome == "not seen":
            assert asked_for(row.kind, ad)
            assert not asked_for(row.kind, changed), value
        else:
            assert read(row.kind, changed) == read(row.kind, ad | {name: outcome.strip("`")}), value


def asked_for(kind: Kind, ad: dict[str, Value]) -> bool:
    """Whether the constraint of who reads such ads takes it."""
    import classad2

    constraint = any_of("GlideinMyType", [kind.my_type])
    mine = {name: ad[name] for name in ("GlideinMyType", "Name") if name in ad}
    made = classad2.ClassAd({
        name: classad2.ExprTree(str(value)) if isinstance(value, Expr) else value for name, value in mine.items()
    })  # fmt: skip
    return classad2.ExprTree(constraint).eval(made) is True


# -- ads as glideinWMS writes them


def stock() -> dict[Kind, dict[str, tuple[Value, bool]]]:
    """Return the recorded ads: for each attribute its value and whether the other side reads it."""
    import classad2

    found: dict[Kind, dict[str, tuple[Value, bool]]] = {}
    for section in (Path(__file__).parent / "stock_ads.txt").read_text().split("\n[")[1:]:
        title, _, body = section.partition("]\n")
        lines = [line.removesuffix("  # read") for line in body.splitlines() if line]
        ad = classad2.ClassAd(f"[{'; '.join(lines)}]")
        reads = {line.partition(" =")[0] for line in body.splitlines() if line.endswith("# read")}
        kind = Kind[{one.my_type: one.name for one in Kind}[title]]
        found[kind] = {name: (value, name in reads) for name, value in ad.items()}
    return found


STOCK = stock()
STOCK_KEY = throw_away_key()


def stock_ad(kind: Kind, sender: str = ME) -> dict[str, Value]:
    return {name: value for name, (value, _) in STOCK[kind].items()} | {"AuthenticatedIdentity": sender}


def test_a_stock_factorys_ads_are_read() -> None:
    key, offer = GlobalOffer.from_ad(stock_ad(Kind.GLOBAL_OFFER)), Offer.from_ad(stock_ad(Kind.OFFER))
    assert (str(key.name), key.key_id) == ("v3_10@stock_factory", STOCK_KEY.key_id)
    assert key.public_pem == offer.public_pem == STOCK_KEY.public_pem
    assert (offer.full_name, offer.in_downtime) == ("alpha@v3_10@stock_factory", False)
    assert offer.parameters["GLIDEIN_Collector"] == "Fake"
    assert offer.limits == {"PerEntryMaxGlideins": 1000, "PerEntryMaxIdle": 100, "DefaultPerFrontendMaxIdle": 10}
    assert Size.of_pilots(offer.attributes, None, []).cpus == 8


def test_a_stock_frontends_credentials_are_read() -> None:
    message = Credentials.from_ad(stock_ad(Kind.CREDENTIALS))
    assert (message.factory, str(message.client)) == ("v1@factory", "stock_vo.main")
    identity, values = message.sealed.open(STOCK_KEY)
    assert identity == ME
    assert Credentials.split(values) == ("vo", {"684153": ("pilot", "-----BEGIN CERTIFICATE-----\nof the pilot\n")})


def test_a_stock_frontends_request_is_believed() -> None:
    rules = replace(RULES, key=STOCK_KEY)
    credential = CredentialName("vo", "pilot", "stock_vo.main", "684153")
    trusted = check_request(stock_ad(Kind.REQUEST), rules, {credential}, {})
    one = trusted.request
    assert (one.idle, one.maximum, one.removal, one.idle_lifetime) == (2, 10, Removal.NO, 864000)
    assert (one.stage.signtype, one.stage.group_web) == ("sha1", "http://frontend.test/stock/stage/group_main")
    assert trusted.parameters == {"GLIDEIN_Collector": "central.grid.test:9618"}
    assert [(token.kind, token.ends) for token in trusted.tokens] == [("idtoken", 2_000_000_000)]
    assert (trusted.left_out, trusted.closed_why) == ({}, "")
    with pytest.raises(Refusal, match="is not the sender's"):
        check_request(stock_ad(Kind.REQUEST, "mallory@grid.test"), rules, {credential}, {})


@pytest.mark.parametrize("kind", STOCK, ids=lambda kind: kind.my_type)
def test_what_a_stock_peer_reads_is_written_by_ours(ads: dict[Kind, dict[str, Value]], kind: Kind) -> None:
    ours = ads[kind] | ({"CONDOR_VERSION": "25.14.1"} | ALPHA.published() if kind is Kind.OFFER else {})
    for name, (value, reads) in STOCK[kind].items():
        if reads:
            assert name in ours, f"{kind.my_type} {name}"
            if name not in ("GLIDEIN_CPUS", "GLIDEIN_REQUIRE_VOMS"):  # a number or a word; a string once it is an ad
                assert type(ours[name]) is type(value), f"{kind.my_type} {name}"
