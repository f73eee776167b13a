"""The stage area: formats that pilots read, names that caches cannot confuse, nothing unsigned, nothing rewritten."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.glidein import builder
from pilotbed.glidein.arguments import CODES, encode, pilot_arguments
from pilotbed.glidein.builder import Attribute, Staged, StageError, Tree, main, publish, render, stamped

STARTUP = Path(builder.__file__).parent / "glidein_startup.sh"
POOL = {
    "domain": "grid.test",
    "central": {"central": "/DC=test/CN=central.grid.test"},
    "submit": {"submit": "/DC=test/CN=submit.grid.test"},
    "pilots": {"pilot": "/DC=test/CN=pilot"},
}


def frontend(**more: Any) -> dict[str, Any]:
    groups: dict[str, Any] = {"main": {"attrs": {"GLIDEIN_Max_Idle": 300}}}
    return {"kind": "frontend", "web": "http://frontend.grid.test/stage", "pool": POOL, "groups": groups} | more


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# --- formats ---


def test_description_signature_and_list_have_the_lines_of_glideinwms() -> None:
    area = render([Staged("probe.sh", b"exit 0\n", "exec", output="PROBE")], {"last_script": "x.sh"})
    description = dict(line.split("\t") for line in area.files[area.descript].decode().splitlines())
    assert re.fullmatch(r"description\.[0-9a-f]{12}\.cfg", area.descript)
    assert set(description) == {"signature", "file_list", "last_script"}
    assert re.fullmatch(r"signature\.[0-9a-f]{12}\.sha256", description["signature"])
    assert re.fullmatch(r"file_list\.[0-9a-f]{12}\.lst", description["file_list"])
    lines = [line for line in area.files[description["file_list"]].decode().splitlines() if not line.startswith("#")]
    real = stamped("probe.sh", b"exit 0\n")
    assert lines == [f"probe.sh\t{real}\texec\t0\tGLIDEIN_PS_\tTRUE\tPROBE"]
    for line in area.files[description["signature"]].decode().splitlines():
        assert re.fullmatch(r"[0-9a-f]{64}  [A-Za-z0-9._-]+", line)


def test_the_argument_sign_is_the_digest_of_the_signature_file() -> None:
    area = render([Staged("a", b"a")])
    (signature,) = [content for name, content in area.files.items() if name.startswith("signature.")]
    assert area.sign == hashlib.sha256(signature).hexdigest()


def test_every_file_of_an_area_is_signed() -> None:
    for area in builder.build(frontend()).areas.values():
        (signature,) = [name for name in area.files if name.startswith("signature.")]
        lines = area.files[signature].decode().splitlines()
        signed = {name: digest for digest, name in (line.split("  ") for line in lines)}
        assert set(signed) == set(area.files) - {signature}
        for name, digest in signed.items():
            assert digest == hashlib.sha256(area.files[name]).hexdigest(), name


def test_sha256sum_agrees_with_the_signature_file(tmp_path: Path) -> None:
    publish(builder.build(frontend()), tmp_path, 0, 0)
    (signature,) = tmp_path.glob("signature.*")
    subprocess.run(["sha256sum", "--check", "--strict", signature.name], cwd=tmp_path, check=True, capture_output=True)


def test_names_change_with_the_content_and_only_then() -> None:
    first, same, other = (render([Staged("a.sh", content)]) for content in (b"1", b"1", b"2"))
    assert (first.descript, first.sign, set(first.files)) == (same.descript, same.sign, set(same.files))
    assert not set(first.files) & set(other.files)


def test_a_change_of_order_changes_the_names() -> None:
    one, two = Staged("a", b"a"), Staged("b", b"b")
    assert render([one, two]).descript != render([two, one]).descript


def test_attributes_keep_their_types() -> None:
    values = {"S": "x y", "I": 7, "B": True, "E": {"expr": "A > 1"}}
    files = builder.attribute_files({name: Attribute.of(name, value) for name, value in values.items()}, known={"I"})
    content = {file.name: file.content.decode() for file in files}
    assert content["constants.cfg"] == "B\tTrue\nE\tA > 1\nI\t7\nS\tx y\n"
    types = {line.split("\t")[0]: line.split("\t")[1] for line in content["condor_vars.lst"].splitlines()}
    assert types == {"S": "S", "B": "C", "E": "C"}  # I is in the standard list already


def test_pool_files_say_who_may_do_what() -> None:
    files = {file.name: file.content.decode() for file in builder.pool_files(POOL, "file_list")}
    assert 'SSL "/DC=test/CN=submit.grid.test" submit\n' in files["pool.mapfile"]
    config = dict(line.split(" = ") for line in files["50-pool.conf"].splitlines())
    assert config["ALLOW_NEGOTIATOR"] == "central@grid.test"
    assert config["ALLOW_DAEMON"].split(", ") == [
        "central@grid.test", "submit@grid.test", "pilot@grid.test", "$(GLIDEIN_Self)",
    ]  # fmt: skip
    assert "*" not in files["50-pool.conf"]


def test_pool_files_hold_dns_as_htcondor_reads_them() -> None:
    odd = POOL | {"pilots": {"pilot": '/DC=test/CN=Robot\\/the "pilot"'}}
    files = {file.name: file.content.decode() for file in builder.pool_files(odd, "file_list")}
    assert r"SSL /^\x2FDC=test\x2FCN=Robot\x5C\x2Fthe \x22pilot\x22$/ pilot" in files["pool.mapfile"].splitlines()


@pytest.mark.parametrize(("dn", "words"), [
    ("/DC=test/CN=Robot/pilot", r"is /DC=test/CN=Robot\/pilot in OpenSSL's one-line form"),
    ("CN=pilot,DC=test", "say /DC=test/CN=pilot"),
])  # fmt: skip
def test_a_dn_that_nobody_can_have_is_refused(dn: str, words: str) -> None:
    with pytest.raises(builder.StageError, match=re.escape(words)):
        builder.pool_files(POOL | {"pilots": {"pilot": dn}}, "file_list")


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "portal"}, "kind"),
        ({"web": "frontend.grid.test"}, "web"),
        ({"web": "http://frontend.grid.test/stage/"}, "web"),
        ({"gruops": {}}, "gruops"),
        ({"condor": "none"}, "condor"),
        ({"groups": {"a/b": {}}}, "a/b"),
        ({"groups": {"main": {"atrs": {}}}}, "atrs"),
        ({"attrs": {"A-B": 1}}, "A-B"),
        ({"attrs": {"A": 1.5}}, "A"),
        ({"attrs": {"A": "x\ny"}}, "control character"),
        ({"pool": {"domain": "grid.test"}}, "central"),
        ({"pool": POOL | {"central": {"central": "CN=central,DC=test"}}}, "CN=central"),
        ({"files": [{"name": "../x", "source": "/dev/null"}]}, r"\.\./x"),
        ({"files": [{"name": "x", "source": "/nonexistent"}]}, "/nonexistent"),
        ({"files": [{"name": "x", "source": "/dev/null", "type": "setuid"}]}, "setuid"),
        ({"files": [{"name": "x", "source": "/dev/null", "list": "mine"}]}, "mine"),
        ({"files": [{"name": "x.tgz", "source": "/dev/null", "type": "untar"}]}, "directory"),
        ({"files": [{"name": "pool.mapfile", "source": "/dev/null"}]}, "two files"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        builder.build(frontend(**change))


# --- the directory ---


def test_a_second_run_rewrites_nothing(tmp_path: Path) -> None:
    new, removed = publish(builder.build(frontend()), tmp_path, 100, 0)
    assert new > 5
    assert removed == 0
    before = snapshot(tmp_path)
    assert publish(builder.build(frontend()), tmp_path, 100, 50) == (0, 0)
    assert snapshot(tmp_path) == before


def test_the_manifest_names_what_is_there(tmp_path: Path) -> None:
    publish(builder.build(frontend()), tmp_path, 100, 0)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest) == {"web", "signtype", "main", "groups"}
    assert manifest["signtype"] == "sha256"
    for directory, part in (("", manifest["main"]), ("group_main", manifest["groups"]["main"])):
        text = (tmp_path / directory / part["descript"]).read_text()
        signature = tmp_path / directory / text.split("\n")[0].split("\t")[1]
        assert hashlib.sha256(signature.read_bytes()).hexdigest() == part["sign"]


def test_files_are_readable_by_the_web_server_and_writable_by_nobody_else(tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        publish(builder.build(frontend()), tmp_path, 100, 0)
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert modes == {0o644}


def test_a_tampered_file_is_mended(tmp_path: Path) -> None:
    publish(builder.build(frontend()), tmp_path, 100, 0)
    victim = next(tmp_path.glob("constants.*"))
    good = victim.read_bytes()
    victim.write_bytes(good + b"x")
    assert publish(builder.build(frontend()), tmp_path, 100, 0) == (1, 0)
    assert victim.read_bytes() == good


def test_old_files_stay_for_queued_pilots_and_then_go(tmp_path: Path) -> None:
    publish(builder.build(frontend()), tmp_path, 100, 0)
    old = {name for name in snapshot(tmp_path) if not name.startswith(".")}
    changed = frontend(attrs={"GLIDEIN_Max_Tail": 30})
    publish(builder.build(changed), tmp_path, 100, 1000)  # long after the files were made: age counts from here
    assert old <= set(snapshot(tmp_path))
    publish(builder.build(changed), tmp_path, 100, 1099)
    assert old <= set(snapshot(tmp_path))
    new, removed = publish(builder.build(changed), tmp_path, 100, 1100)
    assert new == 0
    assert removed > 0
    kept = set(snapshot(tmp_path)) - {"manifest.json", ".retired.json"}
    tree = builder.build(changed)
    assert kept == {str(Path(directory, name)) for directory, area in tree.areas.items() for name in area.files}


def test_a_file_that_is_named_again_is_not_retired(tmp_path: Path) -> None:
    first, second = frontend(), frontend(attrs={"GLIDEIN_Max_Tail": 30})
    publish(builder.build(first), tmp_path, 100, 0)
    publish(builder.build(second), tmp_path, 100, 10)
    publish(builder.build(first), tmp_path, 100, 20)
    assert publish(builder.build(first), tmp_path, 100, 120)[1] > 0  # the second's files
    assert set(builder.build(first).areas[""].files) <= set(snapshot(tmp_path))


def test_the_area_of_a_group_that_is_gone_goes_with_its_last_file(tmp_path: Path) -> None:
    two = frontend(groups={"main": {}, "extra": {}})
    publish(builder.build(two), tmp_path, 10, 0)
    publish(builder.build(frontend()), tmp_path, 10, 1)
    assert (tmp_path / "group_extra").is_dir()
    publish(builder.build(frontend()), tmp_path, 10, 11)
    assert not (tmp_path / "group_extra").exists()


def test_the_command_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "stage.toml", tmp_path / "out"
    config.write_text(
        'kind = "frontend"\nweb = "http://f/stage"\n[groups.main]\n[pool]\ndomain = "grid.test"\n'
        '[pool.central]\nc = "/CN=c"\n[pool.submit]\ns = "/CN=s"\n[pool.pilots]\np = "/CN=p"\n'
    )
    arguments = ["--config", str(config), "--out", str(out)]
    assert main(arguments) == 0
    assert re.fullmatch(r"changed: \d+ new, 0 removed\n", capsys.readouterr().out)
    assert main(arguments) == 0
    assert capsys.readouterr().out == "unchanged\n"
    config.write_text('kind = "frontend"\nwbe = "http://f/stage"\n')
    assert main(arguments) == 1
    assert f"{config}: configuration: groups, pool, web is missing" in capsys.readouterr().err
    config.write_text('kind = "factory"\nweb = "http://f/stage"\n[entries.alpha]\n')
    assert main(arguments) == 1
    assert "pilotbed-factory-stage" in capsys.readouterr().err


# --- what is packed ---


def test_without_condor_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r'install.*condor = "none"'):
        builder.host_condor(tmp_path)


def test_publish_of_an_empty_tree_is_possible(tmp_path: Path) -> None:
    assert publish(Tree(), tmp_path / "new", 0, 0) == (2 - 1, 0)  # the manifest


# --- parameters ---


def decode(word: str) -> str:
    """Decode by the pilot's own function."""
    program = f"set -u; source <(sed -n '/^declare -A option/,/^}}/p' {STARTUP}); decode \"$1\"; printf x"
    done = subprocess.run(["bash", "-c", program, "-", word], capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("x")


@pytest.mark.parametrize(
    "value",
    [
        "central.grid.test:9618", 'TRUE && (Owner == "a b") || x =!= [1,2]', ".dot,", ".nbsp", ",.dot", "$(id) `id`;#",
        "".join(CODES), "ü\\n", ".zzz,", "a..b,,c", "*", "@", ".@,.*,",
    ],
)  # fmt: skip
def test_a_parameter_survives_coding(value: str) -> None:
    word = encode(value)
    assert re.fullmatch(r"[^\s\"'$`&|;<>(){}\[\]*?!~#\\:=+-]+", word)
    assert decode(word) == value


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=200))
def test_coding_is_one_to_one(value: str) -> None:
    rest, out = encode(value), ""
    while rest:
        match = re.match(r"\.([a-z]+),", rest)
        out += {code: char for char, code in CODES.items()}[match[1]] if match else rest[0]
        rest = rest[match.end() :] if match else rest[1:]
    assert out == value


@pytest.mark.parametrize("value", ["", "a\nb", "a\0b", "a\tb"])
def test_what_has_no_code_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="parameter value"):
        encode(value)


def test_arguments_are_options_then_parameters() -> None:
    assert pilot_arguments({"v": "fast", "web": "http://f/s"}, [("A", "b.c")]) == [
        "-v", "fast", "-web", "http://f/s", "-param_A", "b.dot,c",
    ]  # fmt: skip
