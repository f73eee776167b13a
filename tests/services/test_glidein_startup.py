"""The pilot's start-up script against a real web server: what it runs, what it refuses, what it leaves behind."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from pilotbed.glidein.builder import Attribute, Staged, attribute_files, script
from stagebed import STANDARD, STARTUP, Cache, Site, clean, last, note, ran, serve

#: Seconds that a pilot holds its node after a failure, in the tests that must not see it wait for them.
HELD = 600


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


# --- what it runs ---


def test_scripts_run_in_the_order_of_the_protocol(site: Site) -> None:
    done = site.pilot()
    assert done.returncode == 0, done.stderr
    assert ran(done) == ["first.sh", "early.sh", "entry.sh", "client.sh", "group.sh", "after.sh", "last.sh"]
    assert "<status>OK</status>" in done.stdout


def test_a_pilot_needs_no_frontend(site: Site) -> None:
    del site.areas["frontend"], site.areas["frontend/group_main"]
    done = site.pilot()
    assert done.returncode == 0, done.stderr
    assert ran(done) == ["first.sh", "entry.sh", "after.sh", "last.sh"]


def test_attributes_parameters_and_outputs_reach_the_scripts(site: Site) -> None:
    value = 'TRUE && (Owner == "a b") || x =!= "$HOME;`id`"'
    constants = {"A": Attribute.of("A", "from the entry"), "B": Attribute.of("B", 'x\\y "z" $1')}
    data = Staged("data.txt", b"hello\n", output="DATA")
    site.put("factory/entry_alpha", *attribute_files(constants, ()), data)
    show = (
        "#!/bin/bash\n. \"$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' $1)\"\nglidein_config=$1\ngconfig_add Mine a  b\n"
        'for name in A B P ENTRY_DATA Mine GLIDEIN_Entry_Name; do echo "$name=$(gconfig_get $name)"; done\n'
        'cat "$(gconfig_get ENTRY_DATA)"\n'
    )
    site.put("factory", *STANDARD, **last(show))
    done = site.pilot(parameters={"A": "from the frontend", "P": value})
    assert done.returncode == 0, done.stderr
    assert 'A=from the entry\nB=x\\y "z" $1\n' in done.stdout  # a site's constant cannot be overridden
    assert f"P={value}\nENTRY_DATA={site.worker}" in done.stdout
    assert "Mine=a b\nGLIDEIN_Entry_Name=alpha\nhello\n" in done.stdout


def test_a_conditional_file_is_taken_only_if_its_variable_is_1(site: Site) -> None:
    for value, expected in (("1", ["maybe.sh", "last.sh"]), ("0", ["last.sh"])):
        site.put("factory", note("maybe.sh", condition="WANTED"), **last())
        names = ran(site.pilot(parameters={"WANTED": value}))
        assert [name for name in names if name in ("maybe.sh", "last.sh")] == expected


def test_a_tarball_is_unpacked_where_untar_cfg_says(site: Site, tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("unpacked\n")
    subprocess.run(["tar", "-czf", tmp_path / "t.tar.gz", "-C", tmp_path, "inside"], check=True)
    tarball = (tmp_path / "t.tar.gz").read_bytes()
    files = (
        Staged("untar.cfg", b"t.tar.gz\tsoftware\n", output="UNTAR_CFG_FILE"),
        Staged("t.tar.gz", tarball, "untar", output="SOFTWARE"),
    )
    site.put("factory", *files, **last("#!/bin/sh\ncat main/software/inside; ls -l $(dirname $1)/main/t.tar.gz\n"))
    done = site.pilot()
    assert "unpacked" in done.stdout
    assert "t.tar.gz': No such file" in done.stderr


def test_the_last_scripts_code_is_the_pilots(site: Site) -> None:
    site.put("factory", **last("#!/bin/sh\nexit 7\n"))
    done = site.pilot()
    assert done.returncode == 7
    assert "<status>ERROR</status>" in done.stdout


def test_a_failing_script_ends_the_pilot_with_its_reason(site: Site) -> None:
    bad = (
        "#!/bin/bash\nglidein_config=$1\n. \"$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' $1)\"\n"
        'script_error WN_Resource "the disk is <full> & broken" disk /x\n'
    )
    site.put("factory/entry_alpha", Staged("bad.sh", bad.encode(), "exec"))
    done = site.pilot()
    assert done.returncode == 1
    assert "last.sh" not in ran(done)
    assert "glidein: bad.sh: the disk is <full> & broken" in done.stderr
    assert "the disk is &lt;full&gt; &amp; broken" in done.stdout
    assert '<metric name="TestID">bad.sh</metric>' in done.stdout
    assert re.search(r'<metric name="failure" .*>WN_Resource</metric>', done.stdout)


# --- what it refuses: nothing of it, and nothing after it, is run ---


@pytest.mark.parametrize(
    ("where", "prefix"),
    [
        ("factory", "first"), ("factory", "after"), ("factory", "last"), ("factory", "file_list"),
        ("factory", "signature"), ("factory/entry_alpha", "entry"), ("factory/entry_alpha", "signature"),
        ("frontend", "client"),
        ("frontend", "signature"), ("frontend/group_main", "group"), ("frontend/group_main", "signature"),
    ],
)  # fmt: skip
def test_one_changed_byte_is_refused_by_name(site: Site, where: str, prefix: str) -> None:
    path = site.real(where, prefix)
    spoil(path)
    done = site.pilot()
    assert done.returncode == 1
    assert f"glidein: refused: {path.name} from {site.url}/{where}: digest mismatch" in done.stderr
    assert f"{prefix}.sh" not in ran(done)
    assert "last.sh" not in ran(done)
    if prefix == "signature":
        assert ran(done) == []


def test_a_changed_description_is_refused(site: Site) -> None:
    path = site.real("factory", "description")
    path.write_text(path.read_text() + "last_script\tother.sh\n")
    done = site.pilot()
    assert done.returncode == 1
    assert f"refused: {path.name} from {site.url}/factory: digest mismatch" in done.stderr
    assert ran(done) == []


def test_what_is_not_signed_is_refused(site: Site) -> None:
    """A list that names a file without a line in the signature file (the real one only reports it)."""
    _, signed = site.areas["factory"]
    signature = site.real("factory", "signature")
    victim = site.real("factory", "after").name
    signature.write_text("".join(line for line in signature.read_text().splitlines(True) if victim not in line))
    done = site.pilot(sign=hashlib.sha256(signature.read_bytes()).hexdigest())
    assert signed != hashlib.sha256(signature.read_bytes()).hexdigest()
    assert done.returncode == 1
    assert f"glidein: refused: {victim} from {site.url}/factory: not signed" in done.stderr
    assert "first.sh" in ran(done)
    assert f"/factory/{victim}" not in site.asked


def test_the_negative_control_a_resigned_change_is_run(site: Site) -> None:
    """The same change as above is accepted when the factory vouches for it: the check looks at nothing else."""
    path, signature = site.real("factory", "after"), site.real("factory", "signature")
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"echo changed\n")
    new = hashlib.sha256(path.read_bytes()).hexdigest()
    signature.write_text(signature.read_text().replace(old, new))
    done = site.pilot(sign=hashlib.sha256(signature.read_bytes()).hexdigest())
    assert done.returncode == 0, done.stderr
    assert "changed" in done.stdout


@pytest.mark.parametrize("option", ["sign", "signentry", "clientsign", "clientsigngroup"])
def test_a_wrong_signature_argument_is_refused(site: Site, option: str) -> None:
    options = {option: "0" * 64}
    done = site.pilot(**options)
    assert done.returncode == 1
    assert re.search(r"refused: signature\.\w+\.sha256 from \S+: digest mismatch \(expected 0{64}", done.stderr)
    assert ran(done) == []


@pytest.mark.parametrize("line", ["../x", f"{'0' * 32}  md5", f"{'0' * 64}  ../x", f"{'0' * 64}  a b"])
def test_a_signature_file_of_another_form_is_refused(site: Site, line: str) -> None:
    signature = site.real("factory", "signature")
    signature.write_text(f"{line}\n")
    done = site.pilot(sign=hashlib.sha256(signature.read_bytes()).hexdigest())
    assert done.returncode == 1
    assert "is not a digest and a name" in done.stderr


def test_comments_in_a_signature_file_are_none_of_its_digests(site: Site) -> None:
    """As glideinWMS writes it."""
    signature = site.real("frontend", "signature")
    signature.write_text(f"# File: {signature.name}\n#\n\n{signature.read_text()}  # end\n")
    done = site.pilot(clientsign=hashlib.sha256(signature.read_bytes()).hexdigest())
    assert done.returncode == 0, done.stderr
    assert "client.sh" in ran(done)


def unsigned(site: Site, target: str, kind: str, content: bytes) -> subprocess.CompletedProcess[str]:
    """Run a pilot where the frontend's stage lists a file of a kind without a digest; a script shows it."""
    text = b'grep -r . "${1%/*}"/client/*black*; ls -l "${1%/*}"/client\n'
    show = Staged("show.sh", text, "exec", "aftergroup_file_list")
    site.put("frontend", Staged(target, content, kind, "preentry_file_list"), show)
    signature, listed = site.real("frontend", "signature"), site.real("frontend", target.split(".", maxsplit=1)[0])
    signature.write_text("".join(line for line in signature.read_text().splitlines(True) if listed.name not in line))
    return site.pilot(clientsign=hashlib.sha256(signature.read_bytes()).hexdigest())


def test_data_that_is_never_run_may_be_unsigned_and_is_told(site: Site) -> None:
    """A stock frontend's list of nodes that take no pilot, of type nocache."""
    done = unsigned(site, "nodes.blacklist", "nocache", b"^wn13\\.\n")
    assert done.returncode == 0, done.stderr
    assert "^wn13" in done.stdout
    assert re.search(r"nodes\.\w+\.blacklist \(client\) is not signed: taken as data", done.stderr)
    assert re.search(r"^-rw-r--r-- .* nodes\.blacklist$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("target", "kind", "content", "why"),
    [
        ("blacklist.sh", "nocache", b"echo evil\n", "not signed"),
        ("blacklist.txt", "regular", b"x\n", "not signed"),
        ("blacklist", "exec", b"echo evil\n", "not signed"),
        ("blacklist", "wrapper", b"echo evil\n", "not signed"),
        ("blacklist", "config:c", b"START = true\n", "not signed"),
        ("blacklist.txt", "nocache", b"x" * (1 << 20) + b"\n", "not signed, and more than 1048576 bytes"),
    ],
)
def test_nothing_else_may_be(site: Site, target: str, kind: str, content: bytes, why: str) -> None:
    done = unsigned(site, target, kind, content)
    assert done.returncode == 1
    assert re.search(rf"refused: blacklist\S* from {site.url}/frontend: {why}", done.stderr)
    assert "evil" not in done.stdout


@pytest.mark.parametrize("target", ["../evil.sh", ".hidden", "a/b", "-rf"])
def test_a_name_that_leaves_the_work_directory_is_refused(site: Site, target: str) -> None:
    listing = site.real("factory", "file_list")
    old = hashlib.sha256(listing.read_bytes()).hexdigest()
    listing.write_text(listing.read_text().replace("first.sh\t", f"{target}\t", 1))
    signature = site.real("factory", "signature")
    signature.write_text(signature.read_text().replace(old, hashlib.sha256(listing.read_bytes()).hexdigest()))
    done = site.pilot(sign=hashlib.sha256(signature.read_bytes()).hexdigest())
    assert done.returncode == 1
    assert "not a file name" in done.stderr
    assert ran(done) == []


def test_digests_of_another_kind_are_refused(site: Site) -> None:
    done = site.pilot(signtype="md5")
    assert done.returncode == 1
    assert "digests of type 'md5' are not supported" in done.stderr


def test_a_missing_file_is_named(site: Site) -> None:
    site.real("frontend", "client").unlink()
    done = site.pilot()
    assert done.returncode == 1
    assert re.search(r"glidein: cannot fetch \S+/frontend/client\.\w+\.sh: .*404", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "option -name is missing"),
        (["-web"], "option -web has no value"),
        (["-wbe", "x"], "unknown option -wbe"),
        (["web", "x"], "unknown option web"),
        (["-web", "a\nX 1"], "option -web has a control character"),
        (["-param_A-B", "x"], "unknown option -param_A-B"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = subprocess.run(["bash", STARTUP, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"glidein: {message}" in done.stderr


# --- the web cache ---


def test_a_changed_byte_in_the_cache_is_refused_and_the_cache_not_gone_around(site: Site) -> None:
    victim = site.real("factory", "after").name
    cache = serve(partial(Cache, spoils=victim))
    done = site.pilot(proxy=f"http://127.0.0.1:{cache.server_port}")
    cache.shutdown()
    assert done.returncode == 1
    assert f"glidein: refused: {victim} from {site.url}/factory: digest mismatch" in done.stderr
    assert site.asked.count(f"/factory/{victim}") == 1  # by the cache; the pilot did not ask again
    assert "last.sh" not in ran(done)


def test_the_negative_control_an_honest_cache_is_used(site: Site) -> None:
    cache = serve(partial(Cache, spoils=""))
    done = site.pilot(proxy=f"http://127.0.0.1:{cache.server_port}")
    cache.shutdown()
    assert done.returncode == 0, done.stderr


def test_a_cache_that_is_down_is_gone_around(site: Site) -> None:
    done = site.pilot(proxy="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "web cache http://127.0.0.1:9 does not answer" in done.stderr


# --- its proxy, and its end ---


def make_proxy(path: Path, name: str = "pilot") -> None:
    """A certificate with its key in one file: all that the start-up script itself looks at."""
    key = path.with_suffix(".key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", f"/CN={name}", "-keyout", key, "-out", path], check=True, capture_output=True,
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + key.read_bytes())
    key.unlink()


def test_the_proxy_is_copied_where_nobody_else_reads_it(site: Site, tmp_path: Path) -> None:
    proxy = tmp_path / "user.proxy"
    make_proxy(proxy)
    proxy.chmod(0o644)
    show = "#!/bin/bash\nproxy=$X509_USER_PROXY\nstat -c '%a %n' $proxy ${proxy%/*} ${1%/*} $1; cat $proxy\n"
    site.put("factory", **last(show))
    done = site.pilot(environment={"X509_USER_PROXY": str(proxy)})
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^600 {site.worker}/glide_\w+/cred/pilot\.pem$", done.stdout, re.MULTILINE)
    assert re.search(r"^700 \S+/cred$", done.stdout, re.MULTILINE)
    assert re.search(r"^711 \S+/glide_\w+$", done.stdout, re.MULTILINE)
    assert re.search(r"^600 \S+/glidein_config$", done.stdout, re.MULTILINE)
    assert proxy.read_text() in done.stdout


def test_a_renewed_proxy_is_taken_over_and_a_broken_one_is_not(site: Site, tmp_path: Path) -> None:
    proxy, out = tmp_path / "user.proxy", tmp_path / "seen"
    make_proxy(proxy)
    first = proxy.read_text()
    with holding(site, proxy, out, {"GLIDEIN_Proxy_Refresh": "1"}):
        wait_for(lambda: out.is_file() and out.read_text() == first)
        proxy.write_text("half a file")
        time.sleep(1.5)  # one round of the refresh must have seen it; there is no event to wait for
        assert out.read_text() in (first, "")
        make_proxy(proxy, "renewed")
        wait_for(lambda: out.read_text() == proxy.read_text())


@pytest.mark.parametrize(("interval", "renewals"), [("1", 2), ("often", 1)])
def test_how_often_it_looks_for_one_may_come_with_the_stage(
    site: Site, tmp_path: Path, interval: str, renewals: int
) -> None:
    """Which is fetched after the proxy was first taken; what is no number of seconds is as if it were not there."""
    proxy, out = tmp_path / "user.proxy", tmp_path / "seen"
    make_proxy(proxy)
    name = "GLIDEIN_Proxy_Refresh"
    site.put("factory/entry_alpha", *attribute_files({name: Attribute.of(name, interval)}, ()))
    with holding(site, proxy, out):
        for number in range(renewals):
            make_proxy(proxy, f"renewed {number}")
            wait_for(lambda: out.is_file() and out.read_text() == proxy.read_text())


@contextmanager
def holding(site: Site, proxy: Path, out: Path, parameters: dict[str, str] | None = None) -> Iterator[None]:
    """A pilot that writes again and again to ``out`` which proxy it has."""
    loop = f"while [ ! -e {out}.stop ]; do cat $X509_USER_PROXY > {out}; sleep .1; done"
    site.put("factory", *STANDARD, **last(f"#!/bin/bash\n{loop}\n"))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(site.pilot, environment={"X509_USER_PROXY": str(proxy)}, parameters=parameters)
        try:
            yield
        finally:
            Path(f"{out}.stop").touch()
        assert running.result().returncode == 0


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["TERM", "INT", "QUIT", "HUP"])
def test_a_signal_ends_everything_at_once(site: Site, name: str) -> None:
    # A child of the script, and one that has run away from it.
    text = "#!/bin/bash\ntrap 'echo stopping; exit 3' TERM\nsetsid sleep 4242.1 & \nsleep 4242.2 &\necho up\nwait\n"
    site.put("factory", **last(text))
    # Below nohup, or in a script's background, signals come ignored, and bash does not trap what came so: it hung here.
    command = ["env", "--default-signal", *site.command(parameters={"GLIDEIN_Failure_Delay": str(HELD)})]
    pilot = subprocess.Popen(
        command, cwd=site.worker, env=clean(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert pilot.stdout
    for line in pilot.stdout:
        if line == "up\n":
            break
    else:
        pytest.fail("the pilot ended before its last script was up")
    started = time.monotonic()
    pilot.send_signal(getattr(signal, f"SIG{name}"))
    rest = pilot.stdout.read()
    assert pilot.wait(90) != 0
    assert time.monotonic() - started < HELD, "a pilot that was told to stop held its node"
    assert "stopping" in rest
    assert list(site.worker.iterdir()) == []
    done = subprocess.run(["pgrep", "-f", "sleep 4242"], capture_output=True, text=True, check=False)
    assert done.stdout == "", rest


def test_a_signal_between_two_scripts_is_not_forgotten(site: Site, tmp_path: Path) -> None:
    tools, mark = tmp_path / "tools", tmp_path / "mark"
    tools.mkdir()
    (tools / "chmod").write_text('#!/bin/sh\ncase $* in */last.sh) kill -TERM $PPID ;; esac\nexec /bin/chmod "$@"\n')
    (tools / "chmod").chmod(0o755)
    site.put("factory", **last(f"#!/bin/sh\ntouch {mark}\n"))
    done = site.pilot({"PATH": f"{tools}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert "stopped by signal TERM before last.sh" in done.stderr
    assert not mark.exists()


def test_a_failed_pilot_holds_the_node(site: Site) -> None:
    spoil(site.real("factory", "first"))
    started = time.monotonic()
    done = site.pilot(parameters={"GLIDEIN_Failure_Delay": "2"})
    assert done.returncode == 1
    assert time.monotonic() - started >= 2
    assert "keeping this node busy for 2 s" in done.stderr


def test_an_earlier_run_of_the_same_directory_is_not_touched(site: Site) -> None:
    (site.worker / "glide_other").mkdir()
    done = subprocess.run(site.command(), cwd=site.worker, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in site.worker.iterdir()] == ["glide_other"]


@pytest.mark.parametrize("state", ["dead", "alive", "young", "somebody's"])
def test_what_a_killed_pilot_has_left_goes_when_the_next_one_starts(site: Site, state: str) -> None:
    """What one that lives holds, what one is just making, and what has no lock stays."""
    left = site.worker / "glide_abcDEF"
    (left / "execute" / "dir_7").mkdir(parents=True)
    (left / "execute").chmod(0o500)
    lock = left / ("other" if state == "somebody's" else ".alive")
    lock.touch()
    if state != "young":
        os.utime(lock, (time.time() - 120, time.time() - 120))
    with lock.open() as held:
        if state == "alive":
            fcntl.flock(held, fcntl.LOCK_EX)
        done = subprocess.run(site.command(), cwd=site.worker, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert left.exists() == (state != "dead")
    assert (f"removed {left}, which a dead pilot had left" in done.stdout) == (state == "dead")


def test_a_pilot_holds_its_directory_also_through_what_it_has_started(site: Site) -> None:
    """A start-up script that is killed leaves HTCondor behind: nobody clears that away below it."""
    sleeping = Staged("sleep.sh", b"#!/bin/bash\nexec sleep 60\n", "exec")
    site.put("frontend", sleeping)
    streams = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(site.command(), cwd=site.worker, env=clean(), **streams) as pilot:
        assert pilot.stdout
        while "running sleep.sh" not in (line := pilot.stdout.readline()):
            assert line, "it has ended"
        (lock,) = site.worker.glob("glide_*/.alive")
        pilot.kill()
        with lock.open() as held, pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.killpg(pilot.pid, signal.SIGKILL)


# --- what the scripts of the stage decide ---

REFUSES = "glexec: the proxy maps to the account pilot001, which is not in pool_accounts (.gl)"
GLEXECS = {
    "maps": "echo 'uid=21001(gl001) gid=21000(gridlab)'; echo Hello World",
    "refuses pilots": f'echo "{REFUSES}" >&2; exit 203',
    "refuses everybody": 'echo "glexec: the site gives /DC=test/CN=pilot no account" >&2; exit 203',
    "knows no caller": "echo 'glexec: sudo: a password is required' >&2; exit 203",
    "fails": "echo 'glexec: LCMAPS does not start' >&2; exit 202",
    "does not switch": "id; echo Hello World",
    "loses output": "exit 0",
}


@pytest.fixture
def glexec(site: Site, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs glexec_setup.sh in a pilot on a node whose glexec behaves as told (None: there is none)."""
    show = "#!/bin/bash\ngrep -E '^GLEXEC_(JOB|BIN|JOB_WRAPPER) ' $1\n"
    site.put(
        "factory",
        *STANDARD,
        script("glexec_setup.sh", "exec", list="after_file_list"),
        **last(show),
    )
    for directory in (site.worker, *site.worker.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o111)

    def start(behaviour: str | None, **parameters: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "sbin" / "glexec"
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if behaviour:
            path.write_text(f"#!/bin/sh\n[ $1 = -V ] && echo 0.9 && exit\n{GLEXECS[behaviour]}\n")
            path.chmod(0o755)
        return site.pilot(environment={"GLEXEC_LOCATION": str(tmp_path)}, parameters=parameters)

    return start


@pytest.mark.parametrize(
    ("wish", "offer", "insists", "there", "outcome"),
    [
        ("NEVER", "auto", "False", True, "left"),
        ("NEVER", "auto", "True", True, "the entry requires glexec, the VO never uses it"),
        ("OPTIONAL", "NONE", "False", True, "left"),
        ("OPTIONAL", "NONE", "True", True, "the entry requires glexec, but has none"),
        ("OPTIONAL", "auto", "False", True, "used"),
        ("OPTIONAL", "auto", "False", False, "left"),
        ("OPTIONAL", "auto", "True", False, "the entry requires glexec, but this node has none"),
        ("OPTIONAL", "/nonexistent", "False", True, "this node has no glexec"),
        ("REQUIRED", "NONE", "False", True, "the VO requires glexec, the entry has none"),
        ("REQUIRED", "auto", "False", True, "used"),
        ("REQUIRED", "auto", "True", True, "used"),
        ("REQUIRED", "auto", "False", False, "this node has no glexec"),
        ("PERHAPS", "auto", "False", True, "GLIDEIN_Glexec_Use PERHAPS is not"),
    ],
)
def test_wish_and_offer_of_glexec(
    glexec: Callable[..., subprocess.CompletedProcess[str]],
    wish: str,
    offer: str,
    insists: str,
    there: bool,
    outcome: str,
) -> None:
    if Path("/usr/sbin/glexec").exists() and not there:
        pytest.skip("this host has a glexec of its own")
    wishes = {"GLIDEIN_Glexec_Use": wish, "GLEXEC_BIN": offer, "GLIDEIN_REQUIRE_GLEXEC_USE": insists}
    done = glexec("maps" if there else None, **wishes)
    if outcome == "left":
        assert done.returncode == 0, done.stderr
        assert "GLEXEC_JOB False" in done.stdout
        assert "GLEXEC_JOB_WRAPPER 0" in done.stdout
    elif outcome == "used":
        assert done.returncode == 0, done.stderr
        assert "GLEXEC_JOB True" in done.stdout
        assert "GLEXEC_JOB_WRAPPER 1" in done.stdout
    else:
        assert done.returncode == 1
        assert outcome in done.stderr
        assert "GLEXEC_JOB" not in done.stdout


@pytest.mark.parametrize("wish", ["OPTIONAL", "REQUIRED"])
@pytest.mark.parametrize(("behaviour", "works"), [(name, name in ("maps", "refuses pilots")) for name in GLEXECS])
def test_a_glexec_that_is_there_must_work(
    glexec: Callable[..., subprocess.CompletedProcess[str]], wish: str, behaviour: str, works: bool
) -> None:
    done = glexec(behaviour, GLIDEIN_Glexec_Use=wish)
    if works:
        assert done.returncode == 0, done.stderr
        assert "GLEXEC_JOB True" in done.stdout
    else:
        assert done.returncode == 1
        assert "glexec does not work here" in done.stderr


@pytest.mark.parametrize(
    ("offer", "insists", "there", "outcome"),
    [
        ("NONE", "", True, "GLEXEC_JOB False"),
        ("NONE", "True", True, "the entry requires glexec, but has none"),
        ("auto", "", True, "GLEXEC_JOB True"),
        ("auto", "", False, "this node has no glexec"),
        ("/nonexistent", "", True, "this node has no glexec"),
        ("", "", True, "GLEXEC_JOB True"),
        ("", "", False, "GLEXEC_JOB False"),
        ("", "True", False, "the entry requires glexec, but this node has none"),
    ],
)
def test_where_the_vo_is_silent_the_entry_decides(
    glexec: Callable[..., subprocess.CompletedProcess[str]], offer: str, insists: str, there: bool, outcome: str
) -> None:
    """A stock frontend knows nothing of glexec."""
    if Path("/usr/sbin/glexec").exists() and not there:
        pytest.skip("this host has a glexec of its own")
    entry = {"GLEXEC_BIN": offer, "GLIDEIN_REQUIRE_GLEXEC_USE": insists}
    done = glexec("maps" if there else None, **{name: value for name, value in entry.items() if value})
    assert outcome in done.stdout + done.stderr
    assert done.returncode == (0 if "GLEXEC_JOB" in outcome else 1)
