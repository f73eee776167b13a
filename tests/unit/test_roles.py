"""group = role = play, and every role documents what it takes."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pilotbed_suite import CHECKOUT, parts

ROLES = sorted(path for path in (CHECKOUT / "roles").iterdir() if path.is_dir())
PLAYBOOKS = sorted((CHECKOUT / "playbooks").glob("*.yml"))


@functools.cache
def read(path: Path) -> Any:
    """Return the YAML of a file, or {} where there is none: a role has only the parts that it needs."""
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def specification(role: Path) -> dict[str, dict[str, Any]]:
    """Return the documented inputs of a role."""
    main: dict[str, dict[str, dict[str, Any]]] = read(role / "meta/argument_specs.yml")["argument_specs"]["main"]
    return main.get("options", {})


def tree() -> dict[str, Any]:
    """Return the groups of services, each with what is below it, or None."""
    return dict(read(CHECKOUT / "inventory/common/groups.yml")["all"]["children"])


def flavours() -> dict[str, str]:
    """Return the groups that are flavours, with the group above."""
    return {name: above for above, below in tree().items() if below for name in below["children"]}


def groups() -> list[str]:
    """Return the groups that are services: flavours, and what there is of one kind only."""
    return [name for name, below in tree().items() if not below] + list(flavours())


def plays(path: Path) -> list[tuple[str, list[str]]]:
    """Return (group, roles) of the plays of a playbook that have roles.

    They say `all:&GROUP`: to Ansible, the name alone is that of a host where there is one of the same name.
    """
    return [(play["hosts"].removeprefix("all:&"), play["roles"]) for play in read(path) if "roles" in play]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_inputs_are_documented_and_have_defaults(role: Path) -> None:
    documented = specification(role)
    defaults = read(role / "defaults/main.yml")
    assert {name for name, option in documented.items() if not option.get("required")} == set(defaults)
    assert not [name for name, option in documented.items() if not option.get("description") or not option.get("type")]
    # A default that is stated in both places is the same in both.
    stated = {name: option["default"] for name, option in documented.items() if "default" in option}
    assert stated == {name: defaults[name] for name in stated}


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_variables_carry_the_name_of_their_role(role: Path) -> None:
    names = {*specification(role), *read(role / "defaults/main.yml"), *read(role / "vars/main.yml")}
    assert not [name for name in names if not name.removeprefix("__").startswith(f"{role.name}_")]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_role_says_what_it_is(role: Path) -> None:
    about = read(role / "meta/main.yml")["galaxy_info"]
    assert about["license"] == "Apache-2.0"
    assert about["description"]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_role_installs_the_packages_that_the_image_has_for_it(role: Path) -> None:
    """On a machine that was not made from the image, the role brings them itself."""
    installed = [
        task["ansible.builtin.apt"]["name"] for task in read(role / "tasks/main.yml") if "ansible.builtin.apt" in task
    ]
    listed = [name for name in read(role / "vars/main.yml") if name.endswith("_packages")]
    assert [name for name in listed if f"{{{{ {name} }}}}" not in installed] == []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_dependencies_are_roles(role: Path) -> None:
    known = {other.name for other in ROLES}
    assert {item["role"] for item in read(role / "meta/main.yml")["dependencies"]} <= known


@pytest.mark.parametrize("path", sorted(CHECKOUT.glob("roles/*/tasks/validate.yml")), ids=lambda path: path.parts[-3])
def test_a_roles_part_of_the_validation_only_asks(path: Path) -> None:
    """Once for all hosts, and of the inventory alone: playbooks/validate.yml takes seconds, without roles' defaults."""
    for task in read(path):
        assert task["run_once"]
        assert {"ansible.builtin.assert", "ansible.builtin.fail"} & set(task)


def files_of(role: Path) -> set[str]:
    """Return the paths on a node that a role's tree writes or removes."""
    found = {str(path.relative_to(role / kind)) for kind in ("files", "templates") for path in (role / kind).rglob("*")
             if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    return {"/" + name.removesuffix(".j2") for name in found}


def test_no_two_roles_write_the_same_file() -> None:
    """Any two may stand on one host. What two need is a third one's, which both depend on and name in their trees."""
    owners: dict[str, list[str]] = {}
    for role in ROLES:
        for path in files_of(role):
            owners.setdefault(path, []).append(role.name)
    assert "/etc/nginx/sites-enabled/default" in owners
    assert {path: names for path, names in owners.items() if len(names) > 1} == {}


def test_web_services_of_one_host_are_told_apart() -> None:
    """By path on port 80, as they have one name there; by port elsewhere."""
    locations: list[str] = []
    for role in ROLES:
        sites = {path for path in files_of(role) if path.startswith("/etc/nginx/")}
        if not sites or role.name == "nginx":
            continue
        short = role.name.removesuffix("_service")
        assert sites <= {
            f"/etc/nginx/pilotbed.d/80/{role.name}.conf", f"/etc/nginx/sites-enabled/pilotbed-{short}"}  # fmt: skip
        assert {"role": "nginx"} in read(role / "meta/main.yml")["dependencies"]
        trees = [task["config_tree"]["trees"] for task in read(role / "tasks/main.yml") if "config_tree" in task]
        assert ["nginx" in names for names in trees] == [True]
        for path in sites:
            text = next(role.glob(f"*{path}*")).read_text()
            if "/pilotbed.d/80/" in path:
                assert re.findall(r"(?m)^(?!#|location |})\S+", text) == [], "nothing but locations"
                locations += re.findall(r"(?m)^location ((?:= )?\S+)", text)
            else:
                assert not re.search(r"listen (\S+:)?80\b", text)
    assert len(set(locations)) == len(locations) >= 4


@pytest.mark.parametrize("group", groups())
def test_a_group_has_its_role_and_its_play(group: str) -> None:
    assert group in {role.name for role in ROLES}
    if group not in flavours():
        assert (group, [group]) in [play for path in PLAYBOOKS for play in plays(path)]


@pytest.mark.parametrize(("flavour", "above"), flavours().items())
def test_a_flavour_exports_what_the_group_above_it_takes(flavour: str, above: str) -> None:
    """The play of the group above takes a host's flavour from there; nothing else names a flavour."""
    (play,) = [play for path in PLAYBOOKS for play in read(path) if play.get("hosts") == f"all:&{above}"]
    (task,) = play["tasks"]
    assert task["ansible.builtin.include_role"]["name"] == f"{{{{ {above}_flavour }}}}"
    exports = exported(flavour)
    assert exports[f"{above}_flavour"] == flavour
    others = [exported(other) for other, group in flavours().items() if group == above]
    wanted = {name for other in others for name in other if name.startswith(f"{above}_")}
    assert wanted <= set(exports)


def test_no_other_file_names_a_flavour() -> None:
    """A new one is its role, its group and what the group exports; docs, tests and its inventories may speak of it.

    One that is built upon another depends on that one's role.
    """
    places = [*CHECKOUT.glob("playbooks/*.yml"), *CHECKOUT.glob("inventory/common/group_vars/all/*.yml"),
              *CHECKOUT.glob("roles/**/*.*"), *CHECKOUT.glob("plugins/**/*.py"), *CHECKOUT.glob("services/src/**/*.py"),
              *CHECKOUT.glob("lab/src/**/*.py"), *CHECKOUT.glob("suite/src/**/*.py")]  # fmt: skip
    for flavour in flavours():
        above = flavours()[flavour]
        upon = [CHECKOUT / f"roles/{other}/meta/main.yml" for other, group in flavours().items() if group == above]
        named = [str(path.relative_to(CHECKOUT)) for path in places if path.is_file() and flavour not in path.parts
                 and path.parts[-2] != "__pycache__" and path not in upon and flavour in path.read_text()]  # fmt: skip
        assert named == [], flavour


def test_every_flavour_is_met_by_make_test() -> None:
    """By the lab, the grid on three machines, or a scenario that is a part of the suite."""
    sources = [CHECKOUT / "inventory/lab/hosts.yml", CHECKOUT / "inventory/mini/hosts.yml"]
    sources += [CHECKOUT / f"extensions/molecule/{name}/hosts.yml" for name in parts.scenarios()]
    met = {group for path in sources for group, members in read(path)["all"]["children"].items() if members["hosts"]}
    assert set(flavours()) <= met


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda path: path.name)
def test_a_play_names_a_group(path: Path) -> None:
    assert [play["hosts"] for play in read(path) if not re.fullmatch("all(:&[a-z_]+)?", play.get("hosts", "all"))] == []


def test_site_yml_imports_every_layer() -> None:
    imported = {play["ansible.builtin.import_playbook"] for play in read(CHECKOUT / "playbooks/site.yml")}
    assert {path.name for path in PLAYBOOKS if plays(path)} <= imported
    assert read(CHECKOUT / "playbooks/site.yml")[0]["ansible.builtin.import_playbook"] == "validate.yml"


EXPORTS = sorted(CHECKOUT.glob("inventory/common/group_vars/*.yml"))


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.stem)
def test_a_group_exports_under_its_own_name(path: Path) -> None:
    assert path.stem in groups()
    exports = read(path)
    own = (f"{path.stem}_", f"{flavours().get(path.stem, path.stem)}_")
    assert all(name.startswith(own) for name in exports)
    for port in exports.get(f"{path.stem}_sockets", []):
        assert set(port) - {"optional"} == {"program", "port", "proto", "from", "protected"}
        assert port["from"] in {"any", "grid", "site", "host", "nobody"}
    assert set(exports.get(f"{path.stem}_logs", {})) <= {"units", "files", "identifiers"}


RESTARTED = sorted(path for path in CHECKOUT.glob("roles/*/*/etc/systemd/system/**/*")
                   if path.is_file() and "\nRestart=" in path.read_text())  # fmt: skip


@pytest.mark.parametrize("path", RESTARTED, ids=lambda path: str(path.relative_to(CHECKOUT / "roles")))
def test_a_unit_that_comes_back_never_gives_up(path: Path) -> None:
    """Systemd does, after five starts in ten seconds: a daemon that lacked another at boot was gone for good."""
    content = path.read_text()
    seconds = re.search(r"(?m)^RestartSec=(\d+)$", content)
    assert "\nStartLimitIntervalSec=0\n" in content or (seconds and int(seconds[1]) > 2)


def test_every_service_says_where_its_logs_are() -> None:
    """`make logs` shows those of a node's groups, and of no other."""
    assert {group for group in groups() if f"{group}_logs" not in exported(group)} == set()


def exported(group: str) -> dict[str, Any]:
    path = CHECKOUT / f"inventory/common/group_vars/{group}.yml"
    return dict(read(path)) if path.exists() else {}


@pytest.mark.parametrize("path", sorted(CHECKOUT.glob("inventory/*/hosts.yml")), ids=lambda path: path.parent.name)
def test_an_inventory_uses_only_known_groups_and_sites(path: Path) -> None:
    inventory = read(path)["all"]
    unknown = set(inventory["children"]) - set(groups())
    assert all(name.startswith("site_") for name in unknown)
    members = {host for group in inventory["children"].values() for host in group["hosts"]}
    assert members == set(inventory["hosts"])


def tasks_of(role: Path) -> list[dict[str, Any]]:
    """Return every task of a role, those of blocks among them."""
    waiting = [task for path in sorted(role.glob("tasks/*.yml")) for task in read(path) or []]
    found = []
    while waiting:
        task = waiting.pop()
        waiting += [inner for part in ("block", "rescue", "always") for inner in task.get(part, [])]
        found.append(task)
    return found


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_what_only_asks_says_whether_it_asks_in_check_mode(role: Path) -> None:
    """In check mode a command is skipped and answers nothing: what reads runs all the same, what proves is left out."""
    undecided = [
        task["name"]
        for task in tasks_of(role)
        if {"ansible.builtin.command", "ansible.builtin.raw", "ansible.builtin.shell"} & task.keys()
        and task.get("changed_when") is False
        and task.get("check_mode") is not False
        and "not ansible_check_mode" not in str(task.get("when"))
    ]
    assert undecided == []


#: What a task registered, or a fact that one set, on a host that is named: with --limit that host is not in the run.
OF_ANOTHER_HOST = re.compile(r"hostvars\s*\[[^]]*\]\s*(?:\.|\[\s*['\"])__|hostvars\s*,\s*['\"]__")


def reads_another_hosts_results(text: str) -> list[str]:
    """Return the lines that read what tasks left on another host; on those of the same run they may."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if OF_ANOTHER_HOST.search(line) and "ansible_play_hosts" not in line]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_no_role_needs_what_the_run_found_out_on_another_host(role: Path) -> None:
    """It asks that host itself, by delegate_to: site.yml --limit HOST runs on one host alone."""
    paths = [path for path in role.rglob("*") if path.is_file() and path.suffix in (".yml", ".j2")]
    assert {path.name: found for path in paths if (found := reads_another_hosts_results(path.read_text()))} == {}


def test_a_result_of_another_host_is_seen() -> None:
    """Control: as role batch_slurm had it."""
    assert reads_another_hosts_results('key: "{{ hostvars[batch_slurm_controller].__batch_slurm_key.stdout }}"')
    assert not reads_another_hosts_results('all: "{{ ansible_play_hosts | map(\'extract\', hostvars, \'__wanted\') }}"')
