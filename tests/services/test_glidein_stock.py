"""The pilot with the stage area of a stock frontend of glideinWMS."""

from __future__ import annotations

import base64
import io
import platform
import re
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pilotbed.glidein.builder import Staged, script
from pilotbed_suite.stock import File
from stagebed import NOTE, STANDARD, Site, last, note, ran

SHOW = '#!/bin/bash\nsort "$1"; echo "consts of $2"\n'
Start = Callable[..., subprocess.CompletedProcess[str]]
FACTORY = "/DC=test/O=Pool/CN=collector.example"


def stock(
    site: Site, *files: File, group: tuple[File, ...] = (), proxy: str = "", environment: dict[str, str] | None = None,
    **main: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a pilot with such a frontend's two areas."""
    site.put_stock("frontend", {"GLIDECLIENT_Start": "True", "VO_Name": "astro physics"}, *files, **main)
    site.put_stock("frontend/group_main", {"GLIDECLIENT_Group_Start": "RequestMemory < 2000"}, *group)
    around = (environment or {}) | ({"X509_USER_PROXY": proxy} if proxy else {})
    parameters = {"GLIDEIN_Ignore_X509_Duration": "True"}
    return site.pilot(around, parameters=parameters, clientsigntype="sha1")


def test_its_scripts_run_and_its_attributes_are_taken(site: Site) -> None:
    show = File("show.sh", SHOW, "exec", "aftergroup_file_list")
    own = File("vo.sh", f"{NOTE}# the VO's own\n", "exec")
    done = stock(site, show, own, group=(File("group.sh", NOTE, "exec"),), gridmap=f'"{FACTORY}" collector1\n')
    assert done.returncode == 0, done.stderr
    assert "VO_Name astro physics\n" in done.stdout
    assert "GLIDECLIENT_Start True\n" in done.stdout
    assert "GLIDECLIENT_Group_Start RequestMemory < 2000\n" in done.stdout
    for name in ("GLIDECLIENT_GRIDMAP", "GLIDECLIENT_GROUP_BLACKLIST_FILE", "GLIDECLIENT_CONDOR_VARS_FILE"):
        assert f"\n{name} /" in done.stdout
    assert ran(done) == ["first.sh", "entry.sh", "vo.sh", "group.sh", "after.sh", "last.sh"]
    assert "command not found" not in done.stderr.replace("host: command not found", "")


@pytest.mark.parametrize("name", [platform.node(), f"x{platform.node()}"])
def test_its_list_of_nodes_counts(site: Site, name: str) -> None:
    """The node's own name ends the pilot; another name is the control."""
    done = stock(site, blacklist=[name])
    if name == platform.node():
        assert done.returncode == 1
        assert f"This node '{name}' is in the blacklist." in done.stderr
        assert '<metric name="failure"' in done.stdout
    else:
        assert done.returncode == 0, done.stderr
    assert ("after.sh" in ran(done)) == (done.returncode == 0)


#: What a script may call, and the end of what it prints.
CALLS = {
    "gconfig_get VO_Name": "astro physics",
    "add_config_line_safe NOTED here; gconfig_get NOTED": "here",
    "get_work_dir client_group": "/client_group",
    "get_descript_file client | sed s,[.].*[.],.S.,": "description.S.cfg",
    "get_signature client_group | wc -c": "41",
    "get_prefix nobody || echo no": "no",
    "echo data | b64uuencode": "begin-base64 644 -\nZGF0YQo=\n====",
    "glog_setup $1 && glog_write me text 'a word' warn; echo said": "said",
    "robust_realpath /usr/../etc/./hosts": "/etc/hosts",
    "run_with_timeout -s KILL 1 sleep 30; echo $?": "137",
    "run_with_timeout 30 echo in time": "in time",
    "gwms_from_config VO_Name other; gwms_from_config NOTHING other": "astro physics\nother",
}


def test_the_functions_that_its_scripts_source(site: Site) -> None:
    source = "".join(f'. "$(gconfig_get {name}_SOURCE)"\n' for name in
                     ("GET_ID_SELECTORS", "B64UUENCODE", "LOGGING_UTILS", "GLIDEIN_PATHS"))  # fmt: skip
    begin = 'glidein_config=$1\n. "$(grep -m1 "^ADD_CONFIG_LINE_SOURCE " "$1" | cut -d " " -f 2-)"\n'
    calls = "".join(f"echo BEGIN {at}\n{call}\necho END {at}\n" for at, call in enumerate(CALLS))
    done = stock(site, File("call.sh", f"#!/bin/bash\n{begin}{source}{calls}", "exec"))
    assert done.returncode == 0, done.stderr
    for at, (call, outcome) in enumerate(CALLS.items()):
        told = done.stdout.partition(f"BEGIN {at}\n")[2].partition(f"\nEND {at}\n")[0]
        assert told.endswith(outcome), (call, told, done.stderr)
    assert "me warn: a word" in done.stderr


def test_what_is_to_run_before_and_after_a_job_is_found(site: Site) -> None:
    """gwms_process_scripts: programs run, *.sh is sourced, *.ignore and directories are left, and back it goes."""
    text = """#!/bin/bash
glidein_config=$1
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$1")"
. "$(gconfig_get GLIDEIN_PATHS_SOURCE)"
d=$(gconfig_get GLIDEIN_LOCAL_DIR)/x
mkdir -p "$d/exec/prejob/sub"
printf '#!/bin/sh\\necho "program of $1"\\n' >"$d/exec/prejob/1"; chmod 755 "$d/exec/prejob/1"
echo 'WORD=sourced' >"$d/exec/prejob/2.sh"
echo 'exit 3' >"$d/exec/prejob/3.sh.ignore"
cd /
gwms_process_scripts "$d" prejob "$1"
echo "$WORD in $PWD"
gwms_process_scripts "$d" cleanup "$1"
echo on
"""
    done = stock(site, File("pre.sh", text, "exec"))
    assert done.returncode == 0, done.stderr
    assert "/glidein_config\nsourced in /\non\n" in done.stdout
    assert "there is no directory" in done.stderr


@pytest.mark.parametrize("source", ["GET_ID_SELECTORS_SOURCE", "OTHER_SOURCE"])
def test_a_script_that_goes_on_without_a_function_fails_the_pilot(site: Site, source: str) -> None:
    """As check_blacklist.sh did: get_prefix was not found, no list was looked at, and it ended with code 0."""
    text = f"""#!/bin/bash
glidein_config=$1
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$1")"
. "$(gconfig_get {source})"
prefix=$(get_prefix "$2")
echo "prefix $prefix"
exit 0
"""
    done = stock(site, File("careless.sh", text, "exec"))
    if source == "OTHER_SOURCE":
        assert done.returncode == 1
        assert "careless.sh wants the function get_prefix, which this pilot does not offer" in done.stderr
        assert "prefix" not in done.stdout
        assert "last.sh" not in ran(done)
    else:
        assert done.returncode == 0, done.stderr
        assert "prefix GLIDECLIENT_\n" in done.stdout


def test_a_program_that_this_node_lacks_is_the_scripts_own_matter(site: Site) -> None:
    done = stock(site, File("fallback.sh", "#!/bin/bash\nno-such-program || echo without it\n", "exec"))
    assert done.returncode == 0, done.stderr
    assert "without it" in done.stdout
    assert "no-such-program: command not found" in done.stderr


def test_a_script_that_says_that_it_failed_has_failed(site: Site) -> None:
    text = """#!/bin/bash
"$(sed -n 's/^ERROR_GEN_PATH //p' "$1")" -error told.sh WN_Resource "no scratch" directory /scratch
exit 0
"""
    done = stock(site, File("told.sh", text, "exec"))
    assert done.returncode == 1
    assert "told.sh: no scratch" in done.stderr
    assert "last.sh" not in ran(done)


def test_nothing_that_runs_may_be_unsigned_there_either(site: Site) -> None:
    done = stock(site, File("later.sh", NOTE, "nocache"))
    assert done.returncode == 1
    assert f"refused: later.sh from {site.url}/frontend: not signed" in done.stderr


# --- whose pool it is ---

#: Stands for HTCondor: what condor_startup.sh made for it is what counts here. With the real one: tests/grid.
MASTER = b"""#!/bin/bash
cat "$CONDOR_CONFIG" "${CONDOR_CONFIG%/*}/mapfile"
set -- $(sed -n 's/^STARTD_CRON_PERIODIC_\\(EXECUTABLE\\|ARGS\\) = //p' "$CONDOR_CONFIG")
[ $# = 0 ] || { echo FIRST; "$@"; }
grep -q disk.sh "$3" && { sleep 2; touch "$GLIDEIN_WORK_DIR/changed"; echo SECOND; "$@"; }
exit 99
"""


@pytest.fixture
def startup(site: Site, tmp_path: Path) -> Iterator[Start]:
    """Runs condor_startup.sh with a grid map file of the frontend's."""
    packed, proxy = io.BytesIO(), tmp_path / "proxy.pem"
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        info = tarfile.TarInfo("sbin/condor_master")
        info.mode, info.size = 0o755, len(MASTER)
        tar.addfile(info, io.BytesIO(MASTER))
    site.put(
        "factory", *STANDARD, note("after.sh", "after_file_list"),
        Staged("untar.cfg", b"condor.tar.gz\tcondor\n", output="UNTAR_CFG_FILE"),
        Staged("condor.tar.gz", packed.getvalue(), "untar", output="CONDOR_DIR"),
        script("periodic.sh", "regular", output="PERIODIC_SCRIPT"),
        Staged("startup.sh", script("condor_startup.sh", "exec").content, output="STARTUP"),
        script("drain.sh", "exec", period=60),
        **last(script("condor_startup.sh", "exec").content.decode()),
    )  # fmt: skip
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-batch",
            "-subj", "/DC=test/CN=the pilot/CN=4711", "-keyout", str(proxy), "-out", "-"]  # fmt: skip
    certificate = subprocess.run(make, check=True, capture_output=True, text=True).stdout
    proxy.write_text(certificate + proxy.read_text())
    with tempfile.TemporaryDirectory(prefix="pb", dir="/tmp") as short:  # HTCondor's sockets need a short path
        site.worker = Path(short)
        yield lambda gridmap, *files, **more: stock(site, *files, gridmap=gridmap, proxy=str(proxy), **more)


def test_the_pool_is_whom_the_grid_map_file_names(startup: Start) -> None:
    other = r"/DC=test/O=Pool/CN=J\xC3\xB6rg (x)"
    done = startup(f'# File: grid-mapfile\n#\n"{FACTORY}" collector1\n\n"{other}" frontend')
    assert done.returncode == 0, done.stderr
    assert f'\nSSL "{FACTORY}" collector1\nSSL "{other}" frontend\nSSL "/DC=test/CN=the pilot" ' in done.stdout
    assert "\nALLOW_NEGOTIATOR = collector1@$(UID_DOMAIN)\n" in done.stdout
    assert "\nALLOW_DAEMON =  collector1@$(UID_DOMAIN) frontend@$(UID_DOMAIN) $(GLIDEIN_Self)\n" in done.stdout
    assert "ALLOW_NEGOTIATOR = *" not in done.stdout


# --- scripts that are run again ---


def said(done: subprocess.CompletedProcess[str], run: str) -> dict[str, str]:
    """Return the attributes that the periodic scripts' run was to put into the machine ad."""
    part = done.stdout.partition(f"\n{run}\n")[2].partition("\n-\n")[0]
    return dict(line.split(" = ", 1) for line in part.splitlines())


def test_a_periodic_script_that_fails_takes_the_slot_out_of_use(startup: Start) -> None:
    """Due ones run, each with its own period and, in the ad, its own prefix; what they say is in no ad."""
    disk = File("disk.sh", "#!/bin/bash\necho noise\n[[ ! -e $GLIDEIN_WORK_DIR/changed ]]\n", "exec", period=1)
    rare = File("rare.sh", "#!/bin/bash\necho rarely\n", "exec:s", period=600, prefix="VO_")
    done = startup(f'"{FACTORY}" collector1\n', disk, rare)
    assert done.returncode == 0, done.stderr
    assert "\nSTARTD_CRON_PERIODIC_PERIOD = 1s\n" in done.stdout
    assert "(GLIDEIN_PS_OK =!= False)" in done.stdout
    first, second = said(done, "FIRST"), said(done, "SECOND")
    assert (first["GLIDEIN_PS_OK"], first["GLIDEIN_PS_FAILED_LIST"]) == ("True", '""')
    assert (first["VO_OK"], first["VO_LAST"]) == ("True", '"rare.sh"')
    assert (second["GLIDEIN_PS_OK"], second["GLIDEIN_PS_FAILED_LIST"]) == ("False", '"disk.sh"')
    assert second["GLIDEIN_PS_LAST"] == '"disk.sh"'
    assert second["VO_OK"] == "True"
    assert "VO_LAST" not in second, "it was not due"
    assert "noise" not in "".join(first.values()) + "".join(second.values())


@pytest.mark.parametrize(
    ("period", "prefix", "why"),
    [(-1, "VO_", "'-1' is not a number of seconds"), (60, 'X"; evil', "is not the beginning of a name")],
)
def test_a_period_or_a_prefix_that_is_none_is_refused(site: Site, period: int, prefix: str, why: str) -> None:
    done = stock(site, File("odd.sh", NOTE, "exec", period=period, prefix=prefix.replace(" ", "")))
    assert done.returncode == 1
    assert why in done.stderr


@pytest.mark.parametrize(
    ("feature", "left", "outcome"),
    [
        ("MACHINEFEATURES/shutdowntime", 5000, "runs"),
        ("MACHINEFEATURES/shutdowntime", 500, "this node is taken away in"),
        ("JOBFEATURES/shutdowntime_job", 500, "this node is taken away in"),
        ("MACHINEFEATURES/shutdowntime", "soon", "runs"),
        ("MACHINEFEATURES/other", 500, "runs"),
    ],
)
def test_a_node_that_is_taken_away_takes_no_pilot(
    startup: Start, tmp_path: Path, feature: str, left: int | str, outcome: str
) -> None:
    variable, name = feature.split("/")
    (tmp_path / name).write_text(str(int(time.time()) + left if isinstance(left, int) else left))
    done = startup(f'"{FACTORY}" collector1\n', environment={variable: str(tmp_path)})
    if outcome == "runs":
        assert done.returncode == 0, done.stderr
        assert "GLIDEIN_PS_OK = True" in done.stdout
    else:
        assert done.returncode == 1
        assert outcome in done.stderr


@pytest.mark.parametrize(
    ("knobs", "jobs", "seconds", "status", "hole"),
    [
        ("GLIDEIN_BLACKHOLE_NUMJOBS 5", 5, 3, "status=1", True),
        ("GLIDEIN_BLACKHOLE_NUMJOBS 5", 5, 3, "signal=9", True),
        ("GLIDEIN_BLACKHOLE_NUMJOBS 5", 4, 3, "status=1", False),
        ("GLIDEIN_BLACKHOLE_NUMJOBS 5", 9, 3, "status=0", False),
        ("GLIDEIN_BLACKHOLE_NUMJOBS 5", 9, 25, "status=1", False),
        ("GLIDEIN_BLACKHOLE_NUMJOBS 5\nGLIDEIN_BLACKHOLE_RATE 0.02", 9, 25, "status=1", True),
        ("NOTHING 1", 9, 3, "status=1", False),
    ],
)
def test_a_node_that_eats_jobs_is_told_by_how_fast_they_fail(
    site: Site, knobs: str, jobs: int, seconds: int, status: str, hole: bool
) -> None:
    """The logs of the starters say so; these are made, the real ones are in tests/grid."""
    make = f"""#!/bin/bash
    d=$(sed -n 's/^GLIDEIN_LOCAL_DIR //p' "$1") n=$(date +%s)
    printf '%s\n' "{knobs}" >>"$1"
    mkdir "$d/log"
    for i in $(seq {jobs}); do
        t=$((n - 30 - i))
        date -d @$t '+%m/%d/%y %H:%M:%S Create_Process succeeded, pid='$((100 + i))
        date -d @$((t + {seconds})) '+%m/%d/%y %H:%M:%S Process exited, pid='$((100 + i))', {status}'
    done >"$d/log/StarterLog.slot1_1"
    """
    site.put(
        "factory", *STANDARD, Staged("make.sh", make.encode(), "exec"),
        script("black_hole.sh", "exec", list="after_file_list", period=60), **last(),
    )  # fmt: skip
    done = site.pilot()
    if hole:
        assert done.returncode == 1
        within = 50 if seconds == 25 else 20
        assert f"this node eats jobs: {jobs} jobs failed within {within} s of their start" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kinds", [(), ("idtoken",), ("idtoken", "scitoken")])
def test_a_pool_that_asks_for_a_token_gets_it(site: Site, startup: Start, kinds: tuple[str, ...]) -> None:
    """They came as files of the pilot's job."""
    for kind in kinds:
        (site.worker / f"pilot.{kind}").write_text("a.b.c\n")
    done = startup(f'"{FACTORY}" collector1\n')
    assert done.returncode == 0, done.stderr
    methods = "".join(f", {kind.upper()}S" for kind in kinds)
    assert f"\nSEC_CLIENT_AUTHENTICATION_METHODS = SSL{methods}, FS\n" in done.stdout
    for kind, knob, file in (("idtoken", "SEC_TOKEN_DIRECTORY", ""), ("scitoken", "SCITOKENS_FILE", "/pilot.scitoken")):
        assert bool(re.search(rf"^{knob} = /\S+/cred/tokens\.d{file}$", done.stdout, re.MULTILINE)) == (kind in kinds)
    assert "a.b.c" not in done.stdout + done.stderr


#: Grid map files that say of nobody who the pool is, or are none, and why each is refused.
REFUSED = {
    "": "does not say who its pool is",
    f'"{FACTORY}" frontend\n': "does not say who its pool is",
    f"{FACTORY} collector1\n": 'is not "DN" NAME',
    f'"{FACTORY}" collector1 x\n': 'is not "DN" NAME',
    f'"{FACTORY}" "collector1"\n': 'is not "DN" NAME',
    '"/CN=x\\" collector1\n': 'is not "DN" NAME',
    '"/CN=x\\\\y" collector1\n': 'is not "DN" NAME',
    '"CN=x" collector1\n': 'is not "DN" NAME',
    f'"{FACTORY}" $(collector)\n': 'is not "DN" NAME',
}


def test_a_grid_map_file_of_another_form_is_refused(startup: Start) -> None:
    """All of them in one pilot: a script of the frontend's has condor_startup.sh run with each."""
    packed = " ".join(base64.b64encode(gridmap.encode()).decode() or "=" for gridmap in REFUSED)
    again = f"""#!/bin/bash
    startup=$(sed -n 's/^STARTUP //p' "$1") n=0
    for map in {packed}; do
        base64 -d <<<"${{map#=}}" >"$TMPDIR/map"
        sed '/^GLIDECLIENT_GRIDMAP /d' "$1" >"$1.case" && echo "GLIDECLIENT_GRIDMAP $TMPDIR/map" >>"$1.case"
        echo "CASE $n" && "$startup" "$1.case" main 2>&1
        echo "code $?" && n=$((n + 1))
    done
    rm -f otrb_output.xml
    """
    done = startup(f'"{FACTORY}" collector1\n', File("again.sh", again, "exec"))
    assert done.returncode == 0, done.stderr
    for at, why in enumerate(REFUSED.values()):
        told, _, code = done.stdout.partition(f"CASE {at}\n")[2].partition("\ncode ")
        assert why in told, (at, told)
        assert code.startswith("1\n")
        assert "ALLOW_DAEMON" not in told
