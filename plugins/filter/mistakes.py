"""Filters of playbooks/validate.yml: what an inventory says that cannot work, a line each with value and remedy.

A name that is checked here ends in /etc/hosts, a certificate, an account, a group or a DN, where a wrong one is refused
late, on some node, in that program's words, or not at all. Needs ansible-core alone.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from pathlib import Path

import yaml

#: RFC 1123, in lower case: certificates and the pool's identities compare names byte by byte.
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
#: Octets of a CN: RFC 5280, ub-common-name.
_CN = 64
#: systemd-sysusers takes no longer ones ("is not a valid user or group name"), whatever POSIX allows.
_ACCOUNT, _ACCOUNT_LENGTH = r"[a-z_][a-z0-9_-]*", 31
#: pilotbed.protocol.ads: names that ads' names are joined from.
_PLAIN = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
#: A value as OpenSSL's one-line form has it (docs in pilotbed/dn.py). Programs compare that form.
_VALUE = r"(?:[ -*,.0-\[\]-~]|\\[/+]|\\x(?:[01][0-9A-F]|7F|[89A-F][0-9A-F])|\\(?![/+]|x[0-9A-Fa-f]{2}))+"
_ATTRIBUTE = rf"/(?:[A-Za-z][A-Za-z0-9-]*|[0-9]+(?:\.[0-9]+)+)={_VALUE}"
#: VOMS: EGI and the VOs' registries want a DNS name; it is part of a database's name (64 characters, with "voms_").
_VO = rf"{_LABEL}(?:\.{_LABEL})*"
_VO_LENGTH = 59
_VOMS_PART = r"[A-Za-z0-9_.-]+"

#: Of grid_security_contact: a line of text, RFC 5321's plainer addresses, E.123's telephone numbers.
_CONTACT = {
    "name": (r"[^\x00-\x20\x7f-\x9f](?:[^\x00-\x1f\x7f-\x9f]{0,126}[^\x00-\x20\x7f-\x9f])?", "a name of one line"),
    "email": (rf"[A-Za-z0-9.!#$%&'*+/=?^_`{{|}}~-]{{1,64}}@{_LABEL}(?:\.{_LABEL})*",
              "an address such as security@grid.test"),
    "phone": (r"\+?[0-9(][0-9 ()./-]{2,30}", 'a number in quotes, such as "+41 22 555 0100"'),
}
#: Accounts and groups of Debian, of its packages that roles install, and of the roles themselves.
SYSTEM_NAMES = frozenset("""
    root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc nobody nogroup adm tty disk
    kmem dialout fax voice cdrom floppy tape sudo audio dip operator src shadow utmp video sasl plugdev staff users
    crontab input sgx kvm render netdev messagebus sshd polkitd dbus _apt _ssh _rpc _chrony ssl-cert ntp
    systemd-network systemd-timesync systemd-resolve systemd-journal systemd-coredump systemd-oom
    condor slurm munge mysql mariadb voms myproxy statd postgres squid nginx arc
    border factory pilotlogs pilotrenew frontend pilotcredential glexec relay relay-agent pilotbed
""".split())  # noqa: SIM905
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: Debian Policy, 9.2.2: below, Debian gives them out; above, they are reserved.
_FIRST_ID, _RESERVED = 1000, (60000, 65535)


def _is(pattern, value):
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_count(value, least, most):
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def contact_mistakes(contact):
    """Return what is wrong with grid_security_contact: {name, email}, and perhaps phone."""
    example = "{name: Gridlab security team, email: security@grid.test}"
    if not isinstance(contact, dict):
        return [f"grid_security_contact is {contact}: write whom one calls, such as {example}"]
    found = [f"grid_security_contact has {key}: it has name, email and phone" for key in contact if key not in _CONTACT]
    for key, (pattern, wanted) in _CONTACT.items():
        value = contact.get(key)
        if (key in contact or key != "phone") and not _is(pattern, value):
            given = "missing" if value is None else repr(value)
            found.append(f"grid_security_contact.{key} is {given}: write {wanted}")
    return found


def _twice(owners):
    """Return the keys of ``owners`` (value to its owners) that have several, with these as text."""
    return [(value, " and ".join(map(str, theirs))) for value, theirs in owners.items() if len(theirs) > 1]


def _by(items, key):
    found = {}
    for item in items:
        value = key(item)
        if isinstance(value, (str, int)):
            found.setdefault(value, []).append(item)
    return found


def _tables(items):
    """Return those of a list that are mappings: what is none is told by `shape_mistakes`."""
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _listed(place, value, example):
    """Return (the list ``value``, no mistake), or (nothing, the mistake): a text would be read letter by letter."""
    if value is None or isinstance(value, list):
        return value or [], []
    return [], [f"{place} is {value}: write a list, such as {example}"]


def shape_mistakes(users, vos):
    """Return where grid_users and grid_vos are no lists of mappings."""
    found = []
    for name, items, example in (("grid_users", users, "{account: alice, dn_name: Alice Adams}"),
                                 ("grid_vos", vos, "{name: gridlab, voms_port: 15000, ...}")):  # fmt: skip
        theirs, mistakes = _listed(name, items, f"[{example}]")
        found += mistakes
        found += [f"{name} has {item}: write {example}" for item in theirs if not isinstance(item, dict)]
    return found


# -- networks, addresses, host names


def _network(text):
    """Return the IPv4 network that ``text`` writes, or why it is none."""
    try:
        return ipaddress.IPv4Network(str(text)), ""
    except ValueError as error:
        if ":" in str(text):
            return None, "IPv6 is not supported: packet filters, relays and tests know IPv4 only"
        return None, str(error)


def _address(text):
    """Return the IPv4 address that ``text`` writes, or why it is none."""
    try:
        return ipaddress.IPv4Address(str(text)), ""
    except ValueError:
        if ":" in str(text):
            return None, "IPv6, which is not supported: packet filters, relays and tests know IPv4 only"
        return None, "no IPv4 address"


def network_mistakes(networks):
    """Return what is wrong with grid_networks: by name, {cidr, routes}."""
    found, known = [], {}
    if not isinstance(networks, dict):
        return [f"grid_networks is {networks}: write networks by name, such as {{wan: {{cidr: 10.70.0.0/24}}}}"]
    for name, network in networks.items():
        place = f"grid_networks.{name}"
        if not isinstance(network, dict):
            found.append(f"{place} is {network}: write {{cidr: 10.70.0.0/24}}")
            continue
        cidr, why = _network(network.get("cidr"))
        if cidr is None:
            found.append(f"{place}.cidr is {network.get('cidr')} ({why}): write an IPv4 network such as 10.70.0.0/24")
            continue
        for other, theirs in known.items():
            if cidr.overlaps(theirs):
                found.append(f"networks {other} ({theirs}) and {name} ({cidr}) overlap: give one other addresses")
        known[name] = cidr
        routes = network.get("routes") or {}
        if not isinstance(routes, dict):
            found.append(f"{place}.routes is {routes}: write gateways by target, such as {{default: 10.70.0.1}}")
            continue
        for target, gateway in routes.items():
            if target != "default" and _network(target)[0] is None:
                found.append(f"{place}.routes: {target} is no network: write default, or one such as 10.70.0.0/24")
            address, why = _address(gateway)
            if address is None or address not in cidr:
                found.append(f"{place}.routes: gateway {gateway} is {why or f'outside {cidr}'}: "
                             f"give the address of a router in {name}")  # fmt: skip
    return found


def host_mistakes(hosts, networks, domain, workers):
    """Return what is wrong with names and addresses of hosts.

    Args:
        hosts: by inventory name, {addresses: {network: address}, public: node_public_address or None}.
        networks: grid_networks.
        domain: grid_domain.
        workers: names of the hosts that have a certificate for glexec, too.
    """
    found = []
    if not _is(rf"{_LABEL}(?:\.{_LABEL})*", domain) or _is(r"[0-9.]+", domain):
        found.append(f"grid_domain is {domain}: write lower-case letters, digits and - between dots, such as grid.test")
        domain = "grid_domain"
    owners = {}
    networks = networks if isinstance(networks, dict) else {}
    for name, host in hosts.items():
        found += _name_mistakes(name, domain, name in workers)
        addresses = host["addresses"]
        if addresses and not isinstance(addresses, dict):
            found.append(f"node_addresses of host {name} is {addresses}: write addresses by network, such as "
                         "{wan: 10.70.0.99}")  # fmt: skip
            continue
        if not addresses:
            found.append(f"host {name} is in no network: give it node_addresses, such as {{wan: 10.70.0.99}}")
        for network, text in (addresses or {}).items():
            if network not in networks:
                found.append(f"network {network} of host {name} is not in grid_networks "
                             f"({', '.join(map(str, networks))}): correct node_addresses, or add it there")  # fmt: skip
                continue
            cidr = _network(networks[network].get("cidr"))[0] if isinstance(networks[network], dict) else None
            address, why = _address(text)
            if address is not None and cidr is not None:
                why = _unusable(address, network, cidr)
            if why:
                found.append(f"address {text} of host {name} is {why}: correct its node_addresses")
            else:
                owners.setdefault(text, []).append(name)
        public = host["public"]
        if public is not None and _address(public)[0] is None:
            found.append(f"node_public_address {public} of host {name} is {_address(public)[1]}: "
                         "give the IPv4 address that others reach it at")  # fmt: skip
    found += [f"address {address} is given to {names}, it can be one host's only: change node_addresses of the other"
              for address, names in _twice(owners)]  # fmt: skip
    return found


def _unusable(address, network, cidr):
    if address not in cidr:
        return f"outside network {network} ({cidr})"
    if cidr.prefixlen < 31 and address in (cidr.network_address, cidr.broadcast_address):
        return f"no host's in network {network} ({cidr}), but the network's own or its broadcast address"
    return ""


def _name_mistakes(name, domain, is_worker):
    if not _is(_LABEL, name) or name == "localhost":
        return [f"host {name}: call it by its short name, in lower-case letters, digits and - "
                f"(its full name is NAME.{domain})"]  # fmt: skip
    # Of a worker, the longest name in a certificate is glexec's.
    whole = f"{'glexec.' if is_worker else ''}{name}.{domain}"
    if len(whole) > _CN:
        return [f"host {name}: a certificate takes {_CN} characters as a name, {whole} has {len(whole)}: "
                "shorten the host's name or grid_domain"]  # fmt: skip
    return []


# -- DNs and people


def dn_mistakes(dns):
    """Return what is wrong with DNs: by variable, a DN that is whole (/…/CN=x) or is continued (/…/CN=)."""
    found = []
    for variable, dn in dns.items():
        if not _is(rf"(?:{_ATTRIBUTE})+", f"{dn}x" if str(dn).endswith("=") else dn):
            found.append(f"{variable} is {dn}: write it as OpenSSL does, such as /DC=test/DC=grid/O=Gridlab "
                         r"(/ and + in a value after \, an octet beyond ASCII as \xC3)")  # fmt: skip
    return found


def user_mistakes(users, hosts, vos):
    """Return what is wrong with grid_users.

    Args:
        users: each {account, dn_name}.
        hosts: names of hosts.
        vos: grid_vos, whose pilot_service is the name of a robot certificate.
    """
    # HTCondor knows people, hosts and robots by one name each.
    found, robots = [], [vo.get("pilot_service") for vo in _tables(vos)]
    users = _tables(users)
    for user in users:
        account, name = user.get("account"), user.get("dn_name")
        found += _account_mistakes(f"account {account} of grid_users", account)
        for kind, names in (("host", hosts), ("pilot_service", robots)):
            if account in names:
                found.append(f"account {account} of grid_users is the name of a {kind}, too, and HTCondor knows both "
                             "by it alone: call one otherwise")  # fmt: skip
        if not _is(_VALUE, name) or name != name.strip() or len(name) > _CN:
            found.append(f"dn_name {name} of account {account}: write 1 to {_CN} characters as OpenSSL does, such as "
                         r"Alice Adams, Robot\/Alice or J\xC3\xBCrgen")  # fmt: skip
    for value, theirs in _by(users, lambda user: user.get("account")).items():
        if len(theirs) > 1:
            found.append(f"account {value} is given to {len(theirs)} of grid_users: call each otherwise")
    for value, theirs in _by(users, lambda user: user.get("dn_name")).items():
        if len(theirs) > 1:
            names = " and ".join(str(user.get("account")) for user in theirs)
            found.append(f"dn_name {value} is given to accounts {names}: a DN is one person's")
    return found


def _account_mistakes(what, name):
    if not _is(_ACCOUNT, name) or len(name) > _ACCOUNT_LENGTH:
        return [f"{what}: write at most {_ACCOUNT_LENGTH} lower-case letters, digits, _ and -, a letter first"]
    if name in SYSTEM_NAMES or name.startswith(("systemd-", "pilotbed-")):
        return [f"{what} is the system's own: take another name"]
    return []


# -- VOs


def vo_mistakes(vos, users, hosts):
    """Return what is wrong with the names in grid_vos.

    Args:
        vos: grid_vos.
        users: grid_users.
        hosts: names of hosts.
    """
    found, whole = [], []
    for vo in _tables(vos):
        lacking = [key for key in ("name", "voms_port", "members", "frontend_group", "pilot_service", "pilot_accounts",
                                   "payload_accounts") if vo.get(key) is None]  # fmt: skip
        if lacking:
            found.append(f"VO {vo.get('name', '?')}: {', '.join(lacking)} is missing in grid_vos: "
                         "state it as inventory/common/group_vars/all/grid.yml does")  # fmt: skip
        else:
            whole.append(vo)
    accounts = [user.get("account") for user in _tables(users)]
    for vo in whole:
        place = f"VO {vo['name']}"
        if not _is(_VO, vo["name"]) or len(vo["name"]) > _VO_LENGTH:
            found.append(f"{place}: write its name like a host's, in at most {_VO_LENGTH} lower-case letters, digits, "
                         "- and dots, such as gridlab or vo.example.org")  # fmt: skip
        if not _is_count(vo["voms_port"], 1024, 32767):
            found.append(f"{place}: voms_port is {vo['voms_port']}: give a port from 1024 to 32767, as 15000")
        for key in ("frontend_group", "pilot_service"):
            if not _is(_PLAIN, vo[key]) or len(vo[key]) > _CN:
                found.append(f"{place}: {key} is {vo[key]}: write at most {_CN} letters, digits and ._-, no dot first")
        if vo["pilot_service"] in ("frontend", "renewal") or vo["pilot_service"] in hosts:
            found.append(f"{place}: pilot_service is {vo['pilot_service']}, which is a host's or another "
                         "service's name, and HTCondor knows both by it alone: call it otherwise")  # fmt: skip
        if not isinstance(vo["members"], dict):
            found.append(f"{place}: members is {vo['members']}: write them by account, such as {{alice: {{}}}}")
            continue
        for account, member in vo["members"].items():
            found += _member_mistakes(place, account, member, accounts)
    return found + _shared(whole)


def _shared(vos):
    found = []
    for key in ("name", "voms_port", "frontend_group", "pilot_service"):
        for value, theirs in _by(vos, lambda vo, key=key: vo[key]).items():
            if len(theirs) > 1:
                owners = "grid_vos twice" if key == "name" else f"VOs {' and '.join(vo['name'] for vo in theirs)}"
                found.append(f"{key} {value} is given to {owners}: each VO has its own")
    return found


def _member_mistakes(place, account, member, accounts):
    found = []
    if account not in accounts:
        found.append(f"{place}: member {account} is not in grid_users ({', '.join(map(str, accounts))}): add the "
                     "account there, or take the member out")  # fmt: skip
    if member is not None and not isinstance(member, dict):
        return [*found, f"{place}: member {account} is {member}: write {{groups: [analysis], roles: [Role=admin]}}"]
    groups, wrong = _listed(f"{place}: groups of {account}", (member or {}).get("groups"), "[analysis]")
    roles, more = _listed(f"{place}: roles of {account}", (member or {}).get("roles"), "[Role=admin]")
    found += wrong + more
    for group in groups:
        if not _is(rf"{_VOMS_PART}(?:/{_VOMS_PART})*", group):
            found.append(f"{place}: group {group} of {account}: write it from below the VO on, without a slash first, "
                         "such as analysis or analysis/higgs")  # fmt: skip
    for role in roles:
        if not _is(rf"(?:{_VOMS_PART}/)*Role={_VOMS_PART}", role):
            found.append(f"{place}: role {role} of {account}: write Role=name or group/Role=name")
    return found


# -- sites, pools of accounts


def site_mistakes(hosts, vos):
    """Return what is wrong with names of sites, and of VOs there.

    Args:
        hosts: each {site: site_name or None, vos: site_vos or None}.
        vos: grid_vos.
    """
    found, known = [], [vo.get("name") for vo in _tables(vos)]
    sites = {host["site"]: host["vos"] for host in hosts.values() if host["site"] is not None}
    for name, given in sites.items():
        # Slurm's ClusterName has at most 40 characters.
        if not _is(r"[a-z][a-z0-9_-]{0,39}", name):
            found.append(f"site_name {name}: write at most 40 lower-case letters, digits, _ and -, a letter first")
        accepted, wrong = _listed(f"site_vos of site {name}", given, "[gridlab]")
        found += wrong
        for vo in accepted:
            if vo not in known:
                found.append(f"site_vos of site {name} has {vo}; grid_vos has {', '.join(map(str, known))}: correct it")
    return found


def pool_mistakes(vos, users, first_uid, mapper_uid):
    """Return what is wrong with pools of accounts: names, and numbers that two would have.

    Args:
        vos: grid_vos.
        users: grid_users; each has an account with a group of its own number and name.
        first_uid: submit_first_uid.
        mapper_uid: pool_accounts_mapper_uid.
    """
    found = []
    logins = [user.get("account") for user in _tables(users)]
    # Whose, by which variable, the first number and how many. An account that is not in a pool has a group like itself.
    uids = [("grid_users", "submit_first_uid", first_uid, len(logins)),
            ("glexec", "pool_accounts_mapper_uid", mapper_uid, 1)]  # fmt: skip
    gids, names, groups = [], {}, {}
    for vo in _tables(vos):
        for key in ("pilot_accounts", "payload_accounts"):
            pool, place = vo.get(key), f"{key} of VO {vo.get('name')}"
            if pool is None:
                continue
            if not isinstance(pool, dict):
                found.append(f"{place} is {pool}: write {{prefix: gl, count: 20, first_uid: 21001, group: gl, "
                             "gid: 21000}")  # fmt: skip
                continue
            lacking = [part for part in ("prefix", "count", "first_uid", "group", "gid") if pool.get(part) is None]
            if lacking:
                found.append(f"{place}: {', '.join(lacking)} is missing: "
                             "state it as inventory/common/group_vars/all/grid.yml does")  # fmt: skip
                continue
            found += _form_of(pool, place)
            uids.append((place, "first_uid", pool["first_uid"], pool["count"]))
            gids.append((place, "gid", pool["gid"], 1))
            names.setdefault(str(pool["prefix"]), []).append(place)
            groups.setdefault(str(pool["group"]), []).append(place)
            for login in logins:
                if _is(rf"{re.escape(str(pool['prefix']))}[0-9]+", login) or login == pool["group"]:
                    found.append(f"account {login} of grid_users is an account or the group of {place}, too: "
                                 "call it otherwise")  # fmt: skip
    for what, owners in (("prefix", names), ("group", groups)):
        found += [f"{what} {value} is given to {theirs}: each pool has its own" for value, theirs in _twice(owners)]
    return found + _of_the_system(uids + gids) + _overlaps("uid", uids) + _overlaps("gid", uids[:2] + gids)


def _form_of(pool, place):
    found = []
    # An account is the prefix and three digits; LCMAPS takes all digits at the end of a name for the number.
    if not _is(rf"{_ACCOUNT}(?<![0-9])", pool["prefix"]) or len(pool["prefix"]) > _ACCOUNT_LENGTH - 3:
        found.append(f"prefix {pool['prefix']} of {place}: write at most {_ACCOUNT_LENGTH - 3} lower-case letters, "
                     "digits, _ and -, a letter first and no digit last")  # fmt: skip
    if not _is_count(pool["count"], 1, 999):
        found.append(f"count {pool['count']} of {place}: give a number of accounts from 1 to 999")
    return found + _account_mistakes(f"group {pool['group']} of {place}", pool["group"])


def _of_the_system(ranges):
    """Return which of ``ranges``, each (whose, variable, first, count), are no numbers for people and pools."""
    found = []
    for owner, variable, first, count in ranges:
        if not _is_count(count, 0, 999):
            continue  # it has been told
        if not _is_count(first, _FIRST_ID, _RESERVED[0] - count) and not _is_count(first, _RESERVED[1] + 1, 2**31):
            found.append(f"{variable} {first} of {owner}: give one from {_FIRST_ID} on, with all {count} outside "
                         f"{_RESERVED[0]}-{_RESERVED[1]}: the others are the system's")  # fmt: skip
    return found


def _overlaps(kind, ranges):
    """Return which of ``ranges`` have numbers in common; the groups of accounts are judged as their uids are."""
    sound = [one for one in ranges if _is_count(one[2], 0, 2**31) and _is_count(one[3], 1, 999)]
    return [f"{kind}s of {owner} ({first}-{first + count - 1}) and of {other} ({begin}-{begin + more - 1}) overlap: "
            f"change {variable} of the one or {theirs} of the other"
            for (owner, variable, first, count), (other, theirs, begin, more) in itertools.combinations(sound, 2)
            if first < begin + more and begin < first + count and (kind == "uid" or theirs == "gid")]  # fmt: skip


# -- roles' variables


def role_choices(roles):
    """Return, by variable, the choices that the argument_specs.yml of the roles in directory ``roles`` give."""
    found = {}
    for path in sorted(Path(roles).glob("*/meta/argument_specs.yml")):
        if "choices:" in (text := path.read_text()):
            options = yaml.load(text, Loader=_LOADER)["argument_specs"]["main"].get("options", {})  # noqa: S506 (safe)
            found.update({name: option["choices"] for name, option in options.items() if "choices" in option})
    return found


def choice_mistakes(given, choices):
    """Return where a variable (``given``: by name and host) is none of the ``choices`` of its role."""
    found = []
    for name, known in choices.items():
        wrong = {host: value for host, value in given.get(name, {}).items() if value not in known}
        if wrong:
            found.append(f"{name} of {', '.join(wrong)} is {next(iter(wrong.values()))}; "
                         f"there is {', '.join(map(str, known))}")  # fmt: skip
    return found


class FilterModule:
    """See the functions."""

    def filters(self):
        shared = {name: function for name, function in globals().items() if name.endswith("_mistakes")}
        return {"role_choices": role_choices} | {name: shared[name] for name in shared if not name.startswith("_")}
