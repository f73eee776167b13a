"""The table in docs/glexec.md, row by row: a function each, with the exit code that the document states."""

import re
import time
from dataclasses import dataclass

import pytest
from glexecbed import CHECKOUT, CONF, GLEXEC, OTHER_PILOT, PILOT
from pilotbed.x509 import Credential


@dataclass(frozen=True)
class Row:
    name: str
    text: str
    code: int


def rows():
    text = (CHECKOUT / "docs/glexec.md").read_text().partition("## Conformance")[2].partition("\n## ")[0]
    found = re.findall(r"^\| ([a-z0-9-]+) \| (.+?) \| (\d+) \|$", text, re.MULTILINE)
    return [Row(name, what, int(code)) for name, what, code in found]


ROWS = {}


def row(function):
    ROWS[function.__name__.replace("_", "-")] = function
    return function


def test_every_row_has_its_test_and_every_test_its_row():
    assert [found.name for found in rows()] == list(ROWS)


@pytest.mark.parametrize("found", rows(), ids=lambda found: found.name)
def test_a_call_ends_as_its_row_says(found, pilot):
    done = ROWS[found.name](pilot)
    assert done.code == found.code, f"{found.text}: {done}"
    if found.code in (201, 202, 203):
        assert re.search("^(glexec|mkgltempdir): ", done.err, re.MULTILINE), "the caller learns the reason"
        assert "uid=" not in done.out, "and nothing ran"


# -- variables -----------------------------------------------------------------------------------------------------


@row
def client_cert(pilot):
    done = pilot.glexec()
    assert re.match(r"uid=210\d\d\(gl0\d\d\) gid=21000\(gridlab\)", done.out)
    assert done.field("dn").endswith("/CN=Alice")
    assert done.field("fqan") == "/gridlab/Role=NULL/Capability=NULL"
    return done


@row
def client_cert_unset(pilot):
    return pilot.glexec(GLEXEC_CLIENT_CERT=None)


@row
def client_cert_relative(pilot):
    return pilot.glexec(GLEXEC_CLIENT_CERT=pilot.proxy.lstrip("/"))


@row
def client_cert_absent(pilot):
    return pilot.glexec(GLEXEC_CLIENT_CERT=f"{pilot.work}/none")


def changed(pilot, owner=PILOT, mode=0o600, content=None):
    content = content or pilot.bed.proxy()
    return pilot.glexec(GLEXEC_CLIENT_CERT=pilot.bed.write(f"{pilot.work}/other", content, owner, mode))


@row
def client_cert_foreign(pilot):
    return changed(pilot, owner=OTHER_PILOT, mode=0o644)


@row
def client_cert_mode_0640(pilot):
    return changed(pilot, mode=0o640)


@row
def client_cert_mode_0700(pilot):
    return changed(pilot, mode=0o700)


@row
def client_cert_setuid_bit(pilot):
    return changed(pilot, mode=0o4600)


@row
def client_cert_link(pilot):
    pilot.bed.root(f"ln -s proxy {pilot.work}/link && chown -h {PILOT} {pilot.work}/link")
    return pilot.glexec(GLEXEC_CLIENT_CERT=f"{pilot.work}/link")


@row
def client_cert_pipe(pilot):
    pilot.bed.root(f"mkfifo -m 600 {pilot.work}/pipe && chown {PILOT} {pilot.work}/pipe")
    return pilot.glexec(GLEXEC_CLIENT_CERT=f"{pilot.work}/pipe")


@row
def client_cert_garbage(pilot):
    return changed(pilot, content="-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")


@row
def client_cert_large(pilot):
    return changed(pilot, content=pilot.bed.proxy() + b"\n" * (1 << 20))


@row
def client_cert_expired(pilot):
    return changed(pilot, content=pilot.bed.proxy(hours=-1))


@row
def client_cert_without_key(pilot):
    text = re.sub(r"-----BEGIN RSA PRIVATE.*?PRIVATE KEY-----\n", "", pilot.bed.proxy().decode(), flags=re.DOTALL)
    return changed(pilot, content=text)


@row
def client_cert_user(pilot):
    user = pilot.bed.people["alice"]
    return changed(pilot, content=Credential(user.chain, user.key).pem())


@row
def client_cert_no_voms(pilot):
    return changed(pilot, content=pilot.bed.proxy(fqans=()))


SHOW_PROXY = 'echo "$X509_USER_PROXY"; stat -c "%a %U" "$X509_USER_PROXY"; id -un; cat "$X509_USER_PROXY"'


def copied(pilot, **variables):
    done = pilot.sh(SHOW_PROXY, GLEXEC_SOURCE_PROXY=pilot.proxy, **variables)
    if done.code == 0:
        path, mode, account, content = done.out.split("\n", 3)
        assert mode == f"600 {account}"
        assert content.encode() == pilot.bed.path(pilot.proxy).read_bytes()
        assert not pilot.bed.path(path).exists()
    return done


@row
def source_proxy(pilot):
    done = copied(pilot)
    assert done.out.startswith("/tmp/x509up_glexec_210")
    return done


@row
def source_proxy_empty(pilot):
    return pilot.glexec(GLEXEC_SOURCE_PROXY="")


@row
def source_proxy_absent(pilot):
    return pilot.glexec(GLEXEC_SOURCE_PROXY="/srv/none")


@row
def source_proxy_unset(pilot):
    done = pilot.glexec("/usr/bin/env", X509_USER_PROXY=pilot.proxy)
    assert "X509_USER_PROXY" not in done.out
    return done


@row
def target_proxy(pilot):
    done = copied(pilot, GLEXEC_TARGET_PROXY="/var/tmp/mine")
    assert done.out.startswith("/var/tmp/mine\n")
    return done


@row
def target_proxy_dev_null(pilot):
    done = pilot.sh("env; ls /tmp /var/tmp", GLEXEC_SOURCE_PROXY=pilot.proxy, GLEXEC_TARGET_PROXY="/dev/null")
    assert "x509" not in done.out.lower()
    return done


@row
def target_proxy_relative(pilot):
    return copied(pilot, GLEXEC_TARGET_PROXY="mine")


@row
def target_proxy_foreign(pilot):
    kept = pilot.bed.write("/tmp/foreign", "kept", owner=PILOT, mode=0o666)
    done = copied(pilot, GLEXEC_TARGET_PROXY=kept)
    assert pilot.bed.path(kept).read_text() == "kept"
    return done


@row
def target_proxy_link(pilot):
    pilot.bed.root(f"ln -s {pilot.work}/made /tmp/link && chown -h gl020 /tmp/link; chmod 777 {pilot.work}")
    done = copied(pilot, GLEXEC_TARGET_PROXY="/tmp/link")
    assert not pilot.bed.path(f"{pilot.work}/made").exists()
    return done


@row
def target_proxy_directory(pilot):
    pilot.bed.root(f"chmod 777 {pilot.work}")
    return copied(pilot, GLEXEC_TARGET_PROXY=f"{pilot.work}/mine")


@row
def id(pilot):
    done = pilot.glexec(GLEXEC_ID='job 7\nglexec[1]: caller="root"\x1b[2J')
    assert done.field("id") == "job 7?glexec[1]: caller=?root??[2J"
    return done


WRAPPED = "GLEXEC_ENV=$(glexec_wrapenv {0}) exec glexec /usr/bin/glexec_unwrapenv {1} -- /usr/bin/env"


def wrapped(pilot, wrap="", unwrap=""):
    return pilot.bed.run(
        "sh", "-c", WRAPPED.format(wrap, unwrap), env=pilot.environment(GOOD="1 2", BAD="x", WORSE="y", HOME="/pilots")
    )


@row
def env(pilot):
    done = wrapped(pilot)
    assert {"GOOD=1 2", "BAD=x"} < set(done.out.splitlines())
    assert "HOME=/pilots" not in done.out
    assert "GLEXEC" not in done.out
    return done


@row
def env_exclude(pilot):
    done = wrapped(pilot, "--exclude=BAD", "--exclude=WORSE,NONE")
    assert "GOOD=1 2\n" in done.out
    assert "BAD" not in done.out and "WORSE" not in done.out
    return done


@row
def env_wiped(pilot):
    done = pilot.glexec("/usr/bin/env", SECRET="x", LANG="de_DE", SUDO_USER="root", GLEXEC_ID="1")
    home = f"/srv/site/home/{done.field('target')}"
    assert set(done.out.splitlines()) == {
        f"HOME={home}", f"USER={done.field('target')}", f"LOGNAME={done.field('target')}", "SHELL=/bin/sh",
        "PATH=/usr/local/bin:/usr/bin:/bin",
    }  # fmt: skip
    return done


@row
def mode(pilot):
    return pilot.glexec(GLEXEC_MODE="lcmaps_get_account")


@row
def mode_verify(pilot):
    return pilot.glexec(GLEXEC_MODE="lcmaps_verify_account")


@row
def sandbox(pilot):
    pilot.bed.write(f"{pilot.work}/input", "1")
    done = pilot.sh("pwd; id -un; stat -c %U input; echo out > output; stat -c %U . output",
                    GLEXEC_SANDBOX=pilot.work)  # fmt: skip
    directory, account, *owners = done.out.split()
    assert directory == pilot.work
    assert owners == [account, PILOT, account]
    assert pilot.bed.root(f"stat -c %U {pilot.work}/*").split() == [PILOT] * 3
    return done


@row
def sandbox_foreign(pilot):
    return pilot.glexec(GLEXEC_SANDBOX=pilot.bed.directory(OTHER_PILOT, 0o777))


@row
def sandbox_link(pilot):
    pilot.bed.root(f"ln -s {pilot.work} /srv/work/link")
    return pilot.glexec(GLEXEC_SANDBOX="/srv/work/link")


# -- options and commands ------------------------------------------------------------------------------------------


@row
def option_version(pilot):
    done = pilot.bed.run(GLEXEC, "-V", user="nobody")
    assert "glexec 0.9" in done.out
    return done


@row
def option_help(pilot):
    done = pilot.bed.run(GLEXEC, "-h", user="nobody")
    assert "usage:" in done.out
    return done


@row
def option_dashes(pilot):
    done = pilot.glexec("--", "/bin/echo", "--", "-V")
    assert done.out == "-- -V\n"
    return done


@row
def option_unknown(pilot):
    return pilot.glexec("-x", "/usr/bin/id")


@row
def command_none(pilot):
    return pilot.glexec("--")


@row
def command_absent(pilot):
    return pilot.glexec("/usr/bin/none")


@row
def command_not_executable(pilot):
    return pilot.glexec(pilot.bed.write(f"{pilot.work}/program", "#!/bin/sh\nid\n", mode=0o700))


@row
def command_no_format(pilot):
    return pilot.glexec(pilot.bed.write(f"{pilot.work}/program", "\x7fELFnot", mode=0o755))


@row
def code_own(pilot):
    for code in (0, 1, 127, 200, 205, 255):
        assert pilot.sh(f"exit {code}").code == code
    return pilot.sh("exit 42")


@row
def code_hidden(pilot):
    assert [pilot.sh(f"exit {code}").code for code in (201, 202, 203)] == [204] * 3
    return pilot.sh("exit 204")


@row
def code_signal(pilot):
    assert pilot.sh("kill -TERM $$").code == 143
    return pilot.sh("kill -KILL $$")


@row
def signal_forwarded(pilot):
    since = len(pilot.bed.log())
    program = 'exec "$0" /bin/sh -c "echo started; exec sleep 60"'
    process = pilot.bed.start("sh", "-c", f"echo $$; {program}", GLEXEC, env=pilot.environment())
    pid = process.stdout.readline().strip()
    assert process.stdout.readline() == "started\n"
    pilot.bed.root(f"kill -TERM $(pgrep -u {PILOT} -f 'sbin/glexec /bin/sh')")
    assert pid
    return pilot.bed.finish(process, since)


@row
def streams(pilot):
    done = pilot.sh("cat; echo err >&2", input="through\n")
    assert (done.out, done.err) == ("through\n", "err\n")
    return done


@row
def working_directory(pilot):
    inner = 'cd "$0" && exec glexec /bin/sh -c "pwd; umask; echo ~"'
    done = pilot.bed.run("sh", "-c", inner, "/srv/work", env=pilot.environment())
    assert done.out.splitlines()[:2] == ["/srv/work", "0077"]
    closed = pilot.bed.directory(mode=0o700)
    done = pilot.bed.run("sh", "-c", inner, closed, env=pilot.environment())
    directory, _, home = done.out.splitlines()
    assert directory == home
    return done


@row
def groups(pilot):
    done = pilot.glexec("/usr/bin/id", "-G")
    assert done.out == "21000\n"
    return done


# -- who may -------------------------------------------------------------------------------------------------------


@row
def caller_not_sudo(pilot):
    return pilot.glexec(user="nobody")


@row
def caller_not_listed(pilot):
    with pilot.bed.configured(user_white_list=OTHER_PILOT):
        return pilot.glexec()


@row
def user_banned(pilot):
    with pilot.bed.changed("/etc/grid-security/ban_users.db", lambda text: f'{text}"{pilot.glexec().field("dn")}"\n'):
        done = pilot.glexec()
    assert "/CN=Alice no account" in done.err
    return done


@row
def user_not_pool(pilot):
    return changed(pilot, content=pilot.bed.proxy(fqans=("/gridlab/Role=pilot",)))


@row
def no_new_privileges(pilot):
    return pilot.bed.run("setpriv", "--no-new-privs", GLEXEC, "/usr/bin/id", env=pilot.environment())


@row
def nosuid(pilot):
    command = pilot.bed.command(GLEXEC, "/usr/bin/id", env=pilot.environment())
    at = command.index("setpriv")
    prepare = 'mount --bind /usr/bin /usr/bin; mount -o remount,bind,nosuid /usr/bin; exec "$@"'
    command[at:at] = ["unshare", "-m", "sh", "-ec", prepare, "sh"]
    return pilot.bed.finish(pilot.bed.popen(command))


# -- glexec.conf ---------------------------------------------------------------------------------------------------


@row
def conf_absent(pilot):
    pilot.bed.root(f"mv {CONF} {CONF}.away")
    try:
        return pilot.glexec()
    finally:
        pilot.bed.root(f"mv {CONF}.away {CONF}")


@row
def conf_unknown_key(pilot):
    with pilot.bed.configured(user_whitelist=".pilot"):
        return pilot.glexec()


@row
def conf_linger(pilot):
    with pilot.bed.configured(linger="yes", use_lcas="no", user_identity_switch_by="glexec"):
        assert pilot.glexec().code == 0
    with pilot.bed.configured(use_lcas="yes"):
        assert pilot.glexec().code == 202
    with pilot.bed.configured(user_identity_switch_by="lcmaps"):
        assert pilot.glexec().code == 202
    with pilot.bed.configured(linger="no"):
        return pilot.glexec()


@row
def conf_user_white_list(pilot):
    with pilot.bed.configured(user_white_list="*"):
        assert pilot.glexec().code == 202
    with pilot.bed.configured(user_white_list=f"nobody, {PILOT}"):
        return pilot.glexec()


@row
def conf_group_white_list(pilot):
    with pilot.bed.configured(user_white_list="nobody"):
        assert pilot.glexec().code == 203
    with pilot.bed.configured(user_white_list="nobody", group_white_list="glpilot"):
        return pilot.glexec()


@row
def conf_pool_accounts(pilot):
    with pilot.bed.configured(pool_accounts=".other"):
        done = pilot.glexec()
    assert "pool_accounts" in done.err
    return done


@row
def conf_lcmaps_db_file(pilot):
    with pilot.bed.configured(lcmaps_db_file="/etc/lcmaps/none.db"):
        return pilot.glexec()


@row
def conf_lcmaps_policy(pilot):
    with pilot.bed.configured(lcmaps_get_account_policy="other"):
        return pilot.glexec()


@row
def conf_lcmaps_log_file(pilot):
    path = "/var/log/lcmaps.log"
    pilot.bed.root(f"install -o glexec -m 600 /dev/null {path}")
    with pilot.bed.configured(lcmaps_log_file=path, lcmaps_debug_level="5"):
        done = pilot.glexec()
    assert "/CN=Alice" in pilot.bed.path(path).read_text()
    assert not [line for line in done.log if "lcmaps:" in line]
    pilot.bed.path(path).unlink()
    return done


@row
def conf_crl_directory(pilot):
    with pilot.bed.configured(crl_directory="/srv/none"):
        assert pilot.glexec().code == 0, "no CA is there, so none without a CRL"
    pilot.bed.root("mkdir /srv/crls; cp /etc/grid-security/certificates/*.0 /srv/crls")
    with pilot.bed.configured(crl_directory="/srv/crls"):
        return pilot.glexec()


@row
def conf_log_file(pilot):
    path = "/var/log/glexec.log"
    with pilot.bed.configured(log_destination="file", log_file=path):
        done = pilot.glexec()
        assert pilot.glexec(GLEXEC_CLIENT_CERT=None).code == 201
    lines = pilot.bed.path(path).read_text().splitlines()
    assert [line.partition(" exit=")[2].split()[0] for line in lines] == ["0", "201"]
    assert not [line for line in done.log if "caller=" in line]
    assert pilot.bed.root(f"stat -c '%a %U' {path}; rm {path}") == "600 root\n"
    return done


@row
def conf_create_target_proxy(pilot):
    with pilot.bed.configured(create_target_proxy="no"):
        done = pilot.sh("env; ls /tmp", GLEXEC_SOURCE_PROXY=pilot.proxy)
    assert "x509" not in done.out.lower()
    return done


@row
def conf_preserve_env(pilot):
    def keep(text):
        return text.replace("GLEXEC_MODE", "GLEXEC_MODE SITE_NAME")

    with pilot.bed.configured(preserve_env_variables="SITE_NAME"), pilot.bed.changed("/etc/sudoers.d/glexec", keep):
        done = pilot.glexec("/usr/bin/env", SITE_NAME="here", OTHER="x")
    assert "SITE_NAME=here\n" in done.out and "OTHER" not in done.out
    with pilot.bed.configured(preserve_env_variables="LD_PRELOAD"):
        assert pilot.glexec().code == 202
    return done


EPILOGUE = "/usr/libexec/site-epilogue"


@row
def conf_epilogue(pilot):
    pilot.bed.write(EPILOGUE, "#!/bin/sh\n{ id -u; env; readlink /proc/$$/fd/1; } > /run/epilogue\n", "root", 0o755)
    with pilot.bed.configured(epilogue=EPILOGUE):
        done = pilot.sh("exit 7", GLEXEC_EPILOG_TARGET_RC="0", SECRET="x")
    said = pilot.bed.path("/run/epilogue").read_text().splitlines()
    assert said[0] == "0"
    assert {"GLEXEC_EPILOG_TARGET_RC=7", f"GLEXEC_EPILOG_GLEXEC_USER={PILOT}", "GLEXEC_EPILOG_ARGV0=/bin/sh",
            f"GLEXEC_EPILOG_TARGET_USER={done.field('target')}"} <= set(said)  # fmt: skip
    assert not [line for line in said if "SECRET" in line]
    return done


@row
def conf_epilogue_failed(pilot):
    for script, mode_ in (("#!/bin/sh\nexit 0\n", 0o777), ("#!/bin/sh\nexit 203\n", 0o755)):
        pilot.bed.write(EPILOGUE, script, "root", mode_)
        with pilot.bed.configured(epilogue=EPILOGUE):
            done = pilot.sh(":")
        assert done.code == 202
    return done


@row
def conf_epilogue_timeout(pilot):
    pilot.bed.write(EPILOGUE, "#!/bin/sh\nexec sleep 300\n", "root", 0o755)
    with pilot.bed.configured(epilogue=EPILOGUE, epilogue_timeout="1"):
        began = time.monotonic()
        done = pilot.sh(":")
    assert time.monotonic() - began < 150
    assert not [line for _, line in pilot.bed.processes().values() if line == "sleep 300"]
    return done


@row
def conf_sandbox_handover(pilot):
    with pilot.bed.configured(sandbox_handover="no"):
        return pilot.glexec(GLEXEC_SANDBOX=pilot.work)


@row
def conf_logging_only(pilot):
    with pilot.bed.configured(logging_only="yes"):
        done = pilot.sh("id -un; pwd; stat -c %U $X509_USER_PROXY", GLEXEC_SANDBOX=pilot.work,
                        GLEXEC_SOURCE_PROXY=pilot.proxy)  # fmt: skip
    assert done.out.split() == [PILOT, pilot.work, PILOT]
    assert done.field("mode") == "logging only"
    assert done.field("target").startswith("gl0")
    return done


@row
def conf_logging_only_banned(pilot):
    with pilot.bed.configured(logging_only="yes"):
        return changed(pilot, content=pilot.bed.proxy("mallory", fqans=()))


@row
def conf_sweep_directories(pilot):
    leave = "umask 0; mkdir -p $0/left/d; touch $0/left/d/f; chmod 0 $0/left/d; touch $0/right; echo $0"
    with pilot.bed.configured(sweep_directories=""):
        assert pilot.glexec("/bin/sh", "-c", leave, "/tmp").code == 0
    assert pilot.bed.path("/tmp/left").exists()
    pilot.bed.write("/tmp/pilots", "kept")
    done = pilot.glexec("/bin/sh", "-c", leave, "/var/tmp")
    assert pilot.bed.root("ls /tmp /var/tmp /dev/shm").split() == ["/dev/shm:", "/tmp:", "pilots", "/var/tmp:"]
    return done


@row
def conf_payload_processes(pilot):
    count = "i=0; while [ $i -lt 60 ]; do sleep 5 & i=$((i+1)); done 2>/dev/null; echo no limit"
    assert "no limit" in pilot.sh(count).out
    with pilot.bed.configured(payload_processes="20"):
        done = pilot.sh(f"({count}) || true")
    assert "no limit" not in done.out
    return done


@row
def conf_caller_pools(pilot):
    assert pilot.glexec().code == 0, "control: its own VO's"
    with pilot.bed.configured(caller_pools=".pilot:.co"):
        done = pilot.glexec()
    assert "may run payloads of .co only" in done.field("reason")
    return done


@row
def conf_batch_system(pilot):
    with pilot.bed.configured(batch_system="nosuch"):
        done = pilot.glexec()
    assert "batch system 'nosuch' has no module" in done.field("reason")
    return done


@row
def conf_tracking_gids(pilot):
    command = pilot.bed.command(GLEXEC, "/usr/bin/id", "-G", env=pilot.environment())
    at = command.index("--init-groups")
    command[at : at + 1] = ["--groups", "20000,65010,65100,4"]
    with pilot.bed.configured(tracking_gids="65000-65049"):
        done = pilot.bed.finish(pilot.bed.popen(command))
    assert done.out.split() == ["21000", "65010"]
    assert pilot.bed.finish(pilot.bed.popen(command)).out.split() == ["21000"]
    return done


# -- mkgltempdir ---------------------------------------------------------------------------------------------------


def tempdir(pilot, *arguments):
    return pilot.bed.run("/usr/sbin/mkgltempdir", *arguments, env=pilot.environment())


@row
def conf_gridmapdir(pilot):
    with pilot.bed.leased(PILOT, "/DC=test/DC=grid/O=Gridlab/OU=Services/CN=pilot"):
        done = pilot.glexec()
        with pilot.bed.configured(gridmapdir=""):
            assert pilot.glexec().field("pilot") == ""
    assert done.field("pilot") == "/dc=test/dc=grid/o=gridlab/ou=services/cn=pilot"
    return done


@row
def mkgltempdir(pilot):
    done = tempdir(pilot, pilot.work)
    made = done.out.strip()
    account = pilot.sh(f"cp /bin/true {made}/program && {made}/program && id -un").out.strip()
    assert pilot.bed.root(f"stat -c '%a %U' {made} {made}/..").split() == ["700", account, "755", PILOT]
    other = tempdir(pilot, "-t", "755", "-m", "711", pilot.work).out.strip()
    assert pilot.bed.root(f"stat -c '%a' {other} {other}/..").split() == ["755", "711"]
    pilot.bed.clear()
    return done


@row
def mkgltempdir_remove(pilot):
    made = tempdir(pilot, pilot.work).out.strip()
    assert pilot.sh(f"touch {made}/file").code == 0
    assert tempdir(pilot, "-r", made).code == 1
    done = tempdir(pilot, "-r", "-f", made)
    assert pilot.bed.root(f"ls {pilot.work}").split() == ["proxy"]
    made = tempdir(pilot, pilot.work).out.strip()
    assert tempdir(pilot, "-r", made).code == 0
    assert pilot.bed.root(f"ls {pilot.work}").split() == ["proxy"]
    return done


@row
def mkgltempdir_foreign(pilot):
    directory = pilot.bed.directory()
    assert pilot.bed.path(directory).exists()
    return tempdir(pilot, "-r", "-f", f"{directory}/proxy")
