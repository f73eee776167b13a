"""What plugins/filter/mistakes.py refuses of an inventory, by kind and with its words; and what it must let through.

That playbooks/validate.yml asks each filter, test_validate.py shows.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml
from pilotbed.dn import NotADn, parse
from pilotbed.protocol import ProtocolError
from pilotbed.protocol.ads import check_name
from pilotbed_suite import CHECKOUT


def plugin() -> ModuleType:
    specification = importlib.util.spec_from_file_location("mistakes", CHECKOUT / "plugins/filter/mistakes.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


MISTAKES = plugin()

#: Facts without a mistake.
FACTS: dict[str, Any] = {
    "domain": "grid.test",
    "networks": {"wan": {"cidr": "10.70.0.0/24", "routes": {"10.72.0.0/24": "10.70.0.3"}},
                 "beta": {"cidr": "10.72.0.0/24", "routes": {"default": "10.72.0.1"}}},
    "hosts": {
        "submit": {"addresses": {"wan": "10.70.0.14"}, "public": None, "site": None, "vos": None},
        "router": {"addresses": {"beta": "10.72.0.1", "wan": "10.70.0.3"}, "public": None, "site": "beta", "vos": None},
        "beta-wn1": {"addresses": {"beta": "10.72.0.21"}, "public": "10.70.0.3", "site": "beta", "vos": ["gridlab"]},
    },
    "dns": {"grid_dn_prefix": "/DC=test/DC=grid/O=Gridlab", "grid_host_dn_prefix": "/DC=test/OU=Hosts/CN="},
    "users": [{"account": "alice", "dn_name": "Alice Adams"},
              {"account": "bob", "dn_name": r"Robot\/B\xC3\xBCb (C\+\+)"}],
    "vos": [
        {"name": "gridlab", "voms_port": 15000, "frontend_group": "main", "pilot_service": "pilot",
         "members": {"alice": {"groups": ["analysis", "a/b"], "roles": ["Role=admin", "analysis/Role=x"]}},
         "pilot_accounts": {"prefix": "pilot", "count": 10, "first_uid": 20001, "group": "glpilot", "gid": 20000},
         "payload_accounts": {"prefix": "gl", "count": 20, "first_uid": 21001, "group": "gridlab", "gid": 21000}},
        {"name": "vo.example.org", "voms_port": 15001, "frontend_group": "cosmo", "pilot_service": "cosmopilot",
         "members": {},
         "pilot_accounts": {"prefix": "copilot", "count": 10, "first_uid": 22001, "group": "copilot", "gid": 22000},
         "payload_accounts": {"prefix": "co", "count": 10, "first_uid": 23001, "group": "cosmo", "gid": 23000}},
    ],
    "contact": {"name": "Équipe de sécurité", "email": "security@grid.test", "phone": "+41 22 555 (0)100"},
    "first_uid": 30001, "mapper_uid": 20500, "workers": ["beta-wn1"],
}  # fmt: skip


def mistakes(facts: dict[str, Any]) -> list[str]:
    """Return what all filters say, as playbooks/validate.yml joins it."""
    hosts, users, vos = facts["hosts"], facts["users"], facts["vos"]
    found: list[str] = [
        *MISTAKES.shape_mistakes(users, vos),
        *MISTAKES.contact_mistakes(facts["contact"]),
        *MISTAKES.network_mistakes(facts["networks"]),
        *MISTAKES.host_mistakes(hosts, facts["networks"], facts["domain"], facts["workers"]),
        *MISTAKES.dn_mistakes(facts["dns"]),
        *MISTAKES.user_mistakes(users, list(hosts), vos),
        *MISTAKES.vo_mistakes(vos, users, list(hosts)),
        *MISTAKES.site_mistakes(hosts, vos),
        *MISTAKES.pool_mistakes(vos, users, facts["first_uid"], facts["mapper_uid"]),
    ]
    return found


def test_facts_without_a_mistake() -> None:
    assert mistakes(FACTS) == []


def at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that sets what ``path`` (keys and indices, between blanks) leads to."""

    def change(facts: Any) -> None:
        *way, last = [int(key) if key.isdigit() else key for key in path.split()]
        for key in way:
            facts = facts[key]
        facts[last] = value

    return change


NAME = "lower-case letters, digits and -"
ACCOUNT = "write at most 31 lower-case letters, digits, _ and -, a letter first"
DN = (r"write it as OpenSSL does, such as /DC=test/DC=grid/O=Gridlab "
      r"(/ and + in a value after \, an octet beyond ASCII as \xC3)")  # fmt: skip
PERSON = r"write 1 to 64 characters as OpenSSL does, such as Alice Adams, Robot\/Alice or J\xC3\xBCrgen"
VO = ("write its name like a host's, in at most 59 lower-case letters, digits, - and dots, "
      "such as gridlab or vo.example.org")  # fmt: skip
IPV6 = "IPv6, which is not supported: packet filters, relays and tests know IPv4 only"
SHORT = f"call it by its short name, in {NAME} (its full name is NAME.grid.test)"
ALONE = "and HTCondor knows both by it alone"
LONG = "wn" + "x" * 50

#: What is changed, and what is said of it.
REFUSED: list[tuple[Callable[[dict[str, Any]], object], list[str]]] = [
    # What is no list or mapping where one is due.
    (at("users", "alice"), ["grid_users is alice: write a list, such as [{account: alice, dn_name: Alice Adams}]",
                            "VO gridlab: member alice is not in grid_users (): add the account there, "
                            "or take the member out"]),
    (at("users 1", "bob"), ["grid_users has bob: write {account: alice, dn_name: Alice Adams}"]),
    (at("vos 1", "cosmo"), ["grid_vos has cosmo: write {name: gridlab, voms_port: 15000, ...}"]),
    (at("networks lan", "10.74.0.0/24"), ["grid_networks.lan is 10.74.0.0/24: write {cidr: 10.70.0.0/24}"]),
    (at("hosts submit addresses", "10.70.0.14"),
     ["node_addresses of host submit is 10.70.0.14: write addresses by network, such as {wan: 10.70.0.99}"]),
    (at("vos 1 members", ["alice"]),
     ["VO vo.example.org: members is ['alice']: write them by account, such as {alice: {}}"]),
    (at("vos 0 members alice", "analysis"),
     ["VO gridlab: member alice is analysis: write {groups: [analysis], roles: [Role=admin]}"]),
    (at("vos 0 members alice groups", "analysis"),
     ["VO gridlab: groups of alice is analysis: write a list, such as [analysis]"]),
    (at("vos 0 members alice roles", "Role=x"),
     ["VO gridlab: roles of alice is Role=x: write a list, such as [Role=admin]"]),
    (at("hosts beta-wn1 vos", "gridlab"), ["site_vos of site beta is gridlab: write a list, such as [gridlab]"]),
    (at("vos 1 payload_accounts", "co"),
     ["payload_accounts of VO vo.example.org is co: "
      "write {prefix: gl, count: 20, first_uid: 21001, group: gl, gid: 21000}"]),
    (at("networks beta routes", ["10.72.0.1"]),
     ["grid_networks.beta.routes is ['10.72.0.1']: write gateways by target, such as {default: 10.70.0.1}"]),
    # Whom one calls.
    (at("contact", None), ["grid_security_contact is None: write whom one calls, such as "
                           "{name: Gridlab security team, email: security@grid.test}"]),
    (at("contact", {"name": "Security", "mail": "security@grid.test"}),
     ["grid_security_contact has mail: it has name, email and phone",
      "grid_security_contact.email is missing: write an address such as security@grid.test"]),
    *((at("contact email", address), [f"grid_security_contact.email is {address!r}: "
                                      "write an address such as security@grid.test"])
      for address in ("security", "security@grid.test\nphone: 1", "a b@grid.test", "security@", 7)),
    (at("contact name", "a\nb"), ["grid_security_contact.name is 'a\\nb': write a name of one line"]),
    (at("contact phone", 41225550100),
     ['grid_security_contact.phone is 41225550100: write a number in quotes, such as "+41 22 555 0100"']),
    # Networks.
    *((at("networks wan cidr", cidr), [f"grid_networks.wan.cidr is {cidr} ({why}): "
                                       "write an IPv4 network such as 10.70.0.0/24"])
      for cidr, why in {"10.70.0.1/24": "10.70.0.1/24 has host bits set",
                        "10.70.0/24": "Expected 4 octets in '10.70.0'",
                        "10.70.0.0/33": "'33' is not a valid netmask",
                        "fd00::/64": "IPv6 is not supported: packet filters, relays and tests know IPv4 only",
                        }.items()),
    (at("networks wan cidr", None), ["grid_networks.wan.cidr is None (Expected 4 octets in 'None'): "
                                     "write an IPv4 network such as 10.70.0.0/24"]),
    (at("networks lan", {"cidr": "10.70.0.128/25"}),
     ["networks wan (10.70.0.0/24) and lan (10.70.0.128/25) overlap: give one other addresses"]),
    (at("networks beta routes", {"all": "10.72.0.1"}),
     ["grid_networks.beta.routes: all is no network: write default, or one such as 10.70.0.0/24"]),
    (at("networks beta routes default", "10.70.0.1"),
     ["grid_networks.beta.routes: gateway 10.70.0.1 is outside 10.72.0.0/24: give the address of a router in beta"]),
    # Addresses.
    *((at("hosts beta-wn1 addresses beta", address),
       [f"address {address} of host beta-wn1 is {why}: correct its node_addresses"])
      for address, why in {"10.72.0.321": "no IPv4 address", "10.72.0": "no IPv4 address", "beta": "no IPv4 address",
                           "010.72.0.21": "no IPv4 address", "10.72.0.21/24": "no IPv4 address", "": "no IPv4 address",
                           "fd00::21": IPV6, "::ffff:10.72.0.21": IPV6,
                           "10.71.0.21": "outside network beta (10.72.0.0/24)",
                           "10.72.0.0": "no host's in network beta (10.72.0.0/24), but the network's own or its "
                                        "broadcast address",
                           "10.72.0.255": "no host's in network beta (10.72.0.0/24), but the network's own or its "
                                          "broadcast address"}.items()),
    (at("hosts submit addresses", {}),
     ["host submit is in no network: give it node_addresses, such as {wan: 10.70.0.99}"]),
    (at("hosts submit addresses lan", "10.70.0.14"),
     ["network lan of host submit is not in grid_networks (wan, beta): correct node_addresses, or add it there"]),
    (at("hosts submit addresses wan", "10.70.0.3"),
     ["address 10.70.0.3 is given to submit and router, it can be one host's only: "
      "change node_addresses of the other"]),
    (at("hosts submit public", "outside.example.org"),
     ["node_public_address outside.example.org of host submit is no IPv4 address: "
      "give the IPv4 address that others reach it at"]),
    # Names of hosts.
    *((lambda facts, name=name: facts["hosts"].update({name: {**facts["hosts"]["submit"], "addresses":
                                                              {"wan": "10.70.0.99"}}}), [f"host {name}: {SHORT}"])
      for name in ("submit.grid.test", "Submit", "wn_1", "-wn", "wn-", "a b", "wn\n", "ü", "x" * 64, "localhost", "")),
    (lambda facts: (facts["hosts"].update({LONG: facts["hosts"].pop("beta-wn1")}), facts.update(workers=[LONG])),
     [f"host {LONG}: a certificate takes 64 characters as a name, glexec.{LONG}.grid.test has 69: "
      "shorten the host's name or grid_domain"]),
    *((at("domain", domain),
       [f"grid_domain is {domain}: write {NAME} between dots, such as grid.test"])
      for domain in ("Grid.test", ".grid.test", "grid.test.", "grid..test", "grid_test", "10.0.0.1", "grid test", 7)),
    (at("domain", "d" * 60), [
        f"host {name}: a certificate takes 64 characters as a name, {whole}.{'d' * 60} has {len(whole) + 61}: "
        "shorten the host's name or grid_domain" for name, whole in
        (("submit", "submit"), ("router", "router"), ("beta-wn1", "glexec.beta-wn1"))]),
    # DNs.
    *((at("dns grid_dn_prefix", dn), [f"grid_dn_prefix is {dn}: {DN}"])
      for dn in ("DC=test,DC=grid", "/DC=test/grid", "DC=test", "/DC=a/=b", "/O=Jürgen", r"/O=\xc3\xbc", "/O=a+b",
                 "/O=a\n", "", None)),
    (at("dns grid_host_dn_prefix", "/OU=Hosts/"), [f"grid_host_dn_prefix is /OU=Hosts/: {DN}"]),
    # People.
    *((at("users 1 account", account), [f"account {account} of grid_users: {ACCOUNT}"])
      for account in ("bob brown", "Bob", "1bob", "-bob", "bob.b", "bób", "b" * 32, "bob\n", "", 12, None)),
    *((at("users 1 account", account), [f"account {account} of grid_users is the system's own: take another name"])
      for account in ("root", "condor", "slurm", "www-data", "munge", "voms", "glexec", "systemd-network")),
    *((at("users 1 account", account), [f"account {account} of grid_users is the name of a {kind}, too, {ALONE}: "
                                        "call one otherwise"])
      for account, kind in (("submit", "host"), ("pilot", "pilot_service"))),
    *((at("users 1 dn_name", name), [f"dn_name {name} of account bob: {PERSON}"])
      for name in ("Robot/Bob", "C++", "Jürgen", r"J\xc3", "", " Bob", "Bob\n", "b" * 65, 7)),
    (at("users 1 account", "alice"), ["account alice is given to 2 of grid_users: call each otherwise"]),
    (at("users 1 dn_name", "Alice Adams"),
     ["dn_name Alice Adams is given to accounts alice and bob: a DN is one person's"]),
    # VOs.
    *((at("vos 1 name", name), [f"VO {name}: {VO}"])
      for name in ("Cosmo", "my vo", "cos/mo", "/cosmo", "cosmo.", "c_o", "c" * 60, "cósmo", "")),
    (at("vos 1 name", "gridlab"), ["name gridlab is given to grid_vos twice: each VO has its own"]),
    *((at("vos 1 voms_port", port),
       [f"VO vo.example.org: voms_port is {port}: give a port from 1024 to 32767, as 15000"])
      for port in (0, 80, 70000, "15001", True)),
    (at("vos 1 voms_port", 15000),
     ["voms_port 15000 is given to VOs gridlab and vo.example.org: each VO has its own"]),
    *((at(f"vos 1 {key}", name), [f"VO vo.example.org: {key} is {name}: write at most 64 letters, digits and ._-, "
                                  "no dot first"])
      for key in ("frontend_group", "pilot_service") for name in (".x", "a b", "a/b", "a@b", "", "x" * 65, 7)),
    (at("vos 1 frontend_group", "main"),
     ["frontend_group main is given to VOs gridlab and vo.example.org: each VO has its own"]),
    (at("vos 1 pilot_service", "pilot"),
     ["pilot_service pilot is given to VOs gridlab and vo.example.org: each VO has its own"]),
    *((at("vos 1 pilot_service", name),
       [f"VO vo.example.org: pilot_service is {name}, which is a host's or another service's name, {ALONE}: "
        "call it otherwise"]) for name in ("frontend", "renewal", "submit")),
    (at("vos 1 members", {"alice": None, "eve": None}),
     ["VO vo.example.org: member eve is not in grid_users (alice, bob): add the account there, "
      "or take the member out"]),
    *((at("vos 0 members", {"alice": {"groups": [group]}}),
       [f"VO gridlab: group {group} of alice: write it from below the VO on, without a slash first, "
        "such as analysis or analysis/higgs"])
      for group in ("/gridlab/analysis", "analysis/", "an alysis", "Role=x", "", 7)),
    *((at("vos 0 members", {"alice": {"roles": [role]}}),
       [f"VO gridlab: role {role} of alice: write Role=name or group/Role=name"])
      for role in ("admin", "/gridlab/Role=admin", "Role=", "role=admin", "Role=a b", "Role=a/Role=b")),
    (lambda facts: [facts["vos"][1].pop(key) for key in ("voms_port", "payload_accounts")],
     ["VO vo.example.org: voms_port, payload_accounts is missing in grid_vos: "
      "state it as inventory/common/group_vars/all/grid.yml does"]),
    # Sites.
    *((at("hosts beta-wn1 site", site), [f"site_name {site}: write at most 40 lower-case letters, digits, _ and -, "
                                         "a letter first"])
      for site in ("Beta", "be ta", "1beta", "b" * 41, "", 7)),
    (at("hosts beta-wn1 vos", ["gridlap"]),
     ["site_vos of site beta has gridlap; grid_vos has gridlab, vo.example.org: correct it"]),
    # Pools of accounts.
    *((at("vos 1 payload_accounts prefix", prefix),
       [f"prefix {prefix} of payload_accounts of VO vo.example.org: write at most 28 lower-case letters, digits, _ and "
        "-, a letter first and no digit last"])
      for prefix in ("Co", "1co", "co1", "c o", "c" * 29, "", 7)),
    *((at("vos 1 payload_accounts count", count),
       [f"count {count} of payload_accounts of VO vo.example.org: give a number of accounts from 1 to 999"])
      for count in (0, -1, 1000, "10", 1.5)),
    (at("vos 1 payload_accounts group", "cos mo"),
     [f"group cos mo of payload_accounts of VO vo.example.org: {ACCOUNT}"]),
    (at("vos 1 payload_accounts group", "users"),
     ["group users of payload_accounts of VO vo.example.org is the system's own: take another name"]),
    (at("vos 1 payload_accounts prefix", "gl"),
     ["prefix gl is given to payload_accounts of VO gridlab and payload_accounts of VO vo.example.org: "
      "each pool has its own"]),
    (at("vos 1 payload_accounts group", "gridlab"),
     ["group gridlab is given to payload_accounts of VO gridlab and payload_accounts of VO vo.example.org: "
      "each pool has its own"]),
    *((at("users 1 account", account),
       [f"account {account} of grid_users is an account or the group of {place}, too: call it otherwise"])
      for account, place in (("gl001", "payload_accounts of VO gridlab"), ("glpilot", "pilot_accounts of VO gridlab"))),
    (at("vos 1 payload_accounts first_uid", 22010),
     ["uids of pilot_accounts of VO vo.example.org (22001-22010) and of payload_accounts of VO vo.example.org "
      "(22010-22019) overlap: change first_uid of the one or first_uid of the other"]),
    (at("vos 1 payload_accounts first_uid", 29999),
     ["uids of grid_users (30001-30002) and of payload_accounts of VO vo.example.org (29999-30008) overlap: "
      "change submit_first_uid of the one or first_uid of the other"]),
    (at("mapper_uid", 21001),
     ["uids of glexec (21001-21001) and of payload_accounts of VO gridlab (21001-21020) overlap: "
      "change pool_accounts_mapper_uid of the one or first_uid of the other"]),
    (at("first_uid", 20500),
     ["uids of grid_users (20500-20501) and of glexec (20500-20500) overlap: "
      "change submit_first_uid of the one or pool_accounts_mapper_uid of the other"]),
    (at("vos 1 payload_accounts gid", 22000),
     ["gids of pilot_accounts of VO vo.example.org (22000-22000) and of payload_accounts of VO vo.example.org "
      "(22000-22000) overlap: change gid of the one or gid of the other"]),
    (at("vos 1 payload_accounts gid", 20500),
     ["gids of glexec (20500-20500) and of payload_accounts of VO vo.example.org (20500-20500) overlap: "
      "change pool_accounts_mapper_uid of the one or gid of the other"]),
    *((at("vos 1 payload_accounts first_uid", uid),
       [f"first_uid {uid} of payload_accounts of VO vo.example.org: give one from 1000 on, with all 10 outside "
        "60000-65535: the others are the system's"])
      for uid in (0, 991, 999, 59995, 65535, "23001", -5)),
    (at("vos 1 payload_accounts gid", 100),
     ["gid 100 of payload_accounts of VO vo.example.org: give one from 1000 on, with all 1 outside 60000-65535: "
      "the others are the system's"]),
    (lambda facts: facts["vos"][1]["payload_accounts"].pop("gid"),
     ["payload_accounts of VO vo.example.org: gid is missing: "
      "state it as inventory/common/group_vars/all/grid.yml does"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[row[1][0][:70] for row in REFUSED])
def test_refused(change: Callable[[dict[str, Any]], object], said: list[str]) -> None:
    facts = copy.deepcopy(FACTS)
    change(facts)
    assert mistakes(facts) == said


def places(facts: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value below ``facts``."""
    for key, value in facts.items() if isinstance(facts, dict) else enumerate(facts):
        yield (*way, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*way, key))


#: What a validation gets from playbooks/validate.yml itself.
OURS = {("hosts",), ("dns",), ("workers",), *(("hosts", name) for name in FACTS["hosts"])}


ABSURD = [None, True, 7, -1.5, "", "a b", "\n", [], {}, ["x"], [["x"]], {"x": 1}, {7: None}, [None]]


@pytest.mark.parametrize("absurd", ABSURD, ids=repr)
def test_nothing_that_yaml_can_say_is_met_with_a_traceback(absurd: Any) -> None:
    for way in places(FACTS):
        if way in OURS or way[0] == "workers" or (way[0] == "hosts" and way[2:3] == ("site",)):
            continue
        facts: Any = copy.deepcopy(FACTS)
        holder = facts
        for key in way[:-1]:
            holder = holder[key]
        holder[way[-1]] = copy.deepcopy(absurd)
        said = mistakes(facts)
        assert all(isinstance(line, str) for line in said), way


# -- the same forms elsewhere


def accepts(function: Callable[..., object], *arguments: object) -> bool:
    try:
        function(*arguments)
    except (NotADn, ProtocolError):
        return False
    return True


@pytest.mark.parametrize("value", [
    "Alice Adams", r"Robot\/Alice", "Robot/Alice", "C++", r"C\+\+", r"J\xC3\xBCrgen", "Jürgen", "a\\b", r"\x4",
    "a\x1f", "a=b", "a,b", "~", r"\xZZ", r"a\\/b", "a\\", "(;:\"'<>)", r"\x0A", r"\x7F",
])  # fmt: skip
def test_a_dn_name_has_openssls_form(value: str) -> None:
    """As pilotbed.dn reads it, whose form the nodes compare."""
    users = [{"account": "alice", "dn_name": value}]
    said = MISTAKES.user_mistakes(users, [], [])
    assert (said == []) == accepts(parse, f"/DC=test/CN={value}"), said


@pytest.mark.parametrize("value", [r"J\xc3\xbcrgen", r"\x41"])
def test_octets_that_openssl_writes_otherwise_are_refused(value: str) -> None:
    """They may stand for a backslash and letters, and are meant for an octet."""
    assert accepts(parse, f"/CN={value}")
    assert MISTAKES.user_mistakes([{"account": "alice", "dn_name": value}], [], []) != []


@pytest.mark.parametrize("name", ["main", "a.b", "A_9-", ".a", "a b", "a@b", "", "ä", "a\n", "-a", "_a"])
def test_a_frontend_group_has_the_protocols_form(name: str) -> None:
    facts = copy.deepcopy(FACTS)
    facts["vos"][0]["frontend_group"] = name
    assert (mistakes(facts) == []) == accepts(check_name, name, "group", False)


def test_accounts_that_roles_make_are_the_systems_own() -> None:
    made = {
        line.split()[1]
        for path in CHECKOUT.glob("roles/*/*/etc/sysusers.d/*")
        for line in path.read_text().splitlines() if re.match(r"[ug] [a-z]", line)
    }  # fmt: skip
    assert {"factory", "glexec"} <= made <= MISTAKES.SYSTEM_NAMES


def test_choices_are_those_that_the_roles_document() -> None:
    choices = MISTAKES.role_choices(CHECKOUT / "roles")
    text = (CHECKOUT / "roles/site_router/meta/argument_specs.yml").read_text()
    options = yaml.safe_load(text)["argument_specs"]["main"]["options"]
    assert choices["site_router_flavour"] == options["site_router_flavour"]["choices"]
    given = {"submit_traversal": {"submit": "relay", "home": "hole"}, "site_router_flavour": {"alpha": "nat"}}
    assert MISTAKES.choice_mistakes(given, choices) == ["submit_traversal of home is hole; there is direct, ccb, relay"]
