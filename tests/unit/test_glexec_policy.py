"""glexec's decisions: what is believed, what is refused, what the payload gets. No root, no grid."""

import base64
import contextlib
import gzip
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilotbed.glexec import front, policy, wrapenv
from pilotbed.glexec.policy import AUTHORISATION_ERROR, SYSTEM_ERROR, Conf, Refusal

GOOD = """\
# a comment
[glexec]
linger = yes
use_lcas = no
user_identity_switch_by = glexec
user_white_list = .pilot, factory
group_white_list = glpilot
pool_accounts = .gl
lcmaps_db_file = /etc/lcmaps/x.db
lcmaps_log_file = /var/log/lcmaps
lcmaps_debug_level = 5
lcmaps_get_account_policy = glexec_get_account
crl_directory = /etc/crls
log_destination = file
log_file = "/var/log/glexec"
create_target_proxy = no
preserve_env_variables = LANG, X509_CERT_DIR
epilogue = /usr/libexec/site/epilogue
epilogue_timeout = 20
sandbox_handover = yes
logging_only = yes
sweep_directories = /tmp /scratch
payload_processes = 500
tracking_gids = 65000-65049
mapping = service
mapping_service = ce.example.org:8443
mapping_credential = /etc/glexec-credential
mapping_timeout = 5
gridmapdir = /srv/gridmapdir
batch_system = slurm
caller_pools = .pilot:.gl, .copilot:.co
"""
MINIMAL = "user_white_list = .pilot\npool_accounts = .gl\n"


def refused(text: str) -> str:
    with pytest.raises(Refusal) as caught:
        policy.parse_conf(text)
    assert caught.value.code == SYSTEM_ERROR
    assert caught.value.reason.startswith("/etc/glexec.conf")
    return caught.value.reason


class TestConf:
    def test_every_key_is_read(self) -> None:
        assert policy.parse_conf(GOOD) == Conf(
            user_white_list=(".pilot", "factory"),
            group_white_list=("glpilot",),
            pool_accounts=(".gl",),
            lcmaps_db_file="/etc/lcmaps/x.db",
            lcmaps_log_file="/var/log/lcmaps",
            lcmaps_debug_level=5,
            lcmaps_get_account_policy="glexec_get_account",
            crl_directory="/etc/crls",
            log_destination="file",
            log_file="/var/log/glexec",
            create_target_proxy=False,
            preserve_env_variables=("LANG", "X509_CERT_DIR"),
            epilogue="/usr/libexec/site/epilogue",
            epilogue_timeout=20,
            sandbox_handover=True,
            logging_only=True,
            sweep_directories=("/tmp", "/scratch"),
            payload_processes=500,
            tracking_gids=range(65000, 65050),
            mapping="service",
            mapping_service="ce.example.org:8443",
            mapping_credential="/etc/glexec-credential",
            mapping_timeout=5,
            gridmapdir="/srv/gridmapdir",
            batch_system="slurm",
            caller_pools=(".pilot:.gl", ".copilot:.co"),
        )
        assert {line.split(" =")[0] for line in GOOD.splitlines()[2:]} == set(Conf.__annotations__)

    def test_what_is_not_said_is_not_allowed(self) -> None:
        conf = policy.parse_conf(MINIMAL)
        assert not conf.sandbox_handover
        assert not conf.logging_only
        assert conf.preserve_env_variables == conf.group_white_list == ()
        assert list(conf.tracking_gids) == []

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("pool_accounts = .gl\n", "user_white_list"),
            ("user_white_list = .pilot\n", "pool_accounts"),
            ("user_white_list = \npool_accounts = .gl\n", "user_white_list"),
            (MINIMAL + "user_whitelist = .x\n", ":3: unknown key 'user_whitelist'"),
            (MINIMAL + "linger = no\n", "linger"),
            (MINIMAL + "pool_accounts = .other\n", ":3: pool_accounts is set twice"),
            (MINIMAL + "[other]\n", "[other]"),
            (MINIMAL + "nonsense\n", "nonsense"),
            ("user_white_list = *\npool_accounts = .gl\n", "'*'"),
            ("user_white_list = .pilot\npool_accounts = *\n", "'*'"),
            (MINIMAL + "lcmaps_db_file = lcmaps.db\n", "lcmaps.db"),
            (MINIMAL + "lcmaps_debug_level = 6\n", "'6'"),
            (MINIMAL + "sandbox_handover = maybe\n", "maybe"),
            (MINIMAL + "logging_only = true\n", "true"),
            (MINIMAL + "use_lcas = yes\n", "use_lcas"),
            (MINIMAL + "user_identity_switch_by = lcmaps\n", "user_identity_switch_by"),
            (MINIMAL + "log_destination = file\n", "log_file"),
            (MINIMAL + "log_file = glexec.log\n", "glexec.log"),
            (MINIMAL + "epilogue = cleanup\n", "cleanup"),
            (MINIMAL + "epilogue_timeout = -1\n", "-1"),
            (MINIMAL + "sweep_directories = tmp\n", "'tmp'"),
            (MINIMAL + "payload_processes = many\n", "many"),
            (MINIMAL + "tracking_gids = 0-100\n", "0-100"),
            (MINIMAL + "tracking_gids = 65000\n", "65000"),
        ],
    )
    def test_a_mistake_is_refused_and_named(self, text: str, named: str) -> None:
        assert named in refused(text)

    @pytest.mark.parametrize(
        "name",
        ["LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PATH", "BASH_ENV", "GLEXEC_ID", "SUDO_UID", "X509_USER_PROXY"],
    )
    def test_variables_that_steer_programs_are_never_preserved(self, name: str) -> None:
        assert name in refused(MINIMAL + f"preserve_env_variables = LANG {name}\n")

    @given(st.text())
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        try:
            conf = policy.parse_conf(text)
        except Refusal as refusal:
            assert refusal.code == SYSTEM_ERROR
        else:
            assert (conf.user_white_list or conf.group_white_list) and conf.pool_accounts

    @given(st.data())
    def test_lines_changed_lost_and_moved_never_say_what_is_not_written(self, data: st.DataObject) -> None:
        """Whatever is read stands in the text, or is the default: nothing is guessed from a damaged line."""
        lines = GOOD.splitlines()
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(lines) - 1))
            line = lines.pop(at)
            match data.draw(st.sampled_from(["lost", "moved", "twice", "cut", "changed", "value"])):
                case "moved":
                    lines.insert(data.draw(st.integers(0, len(lines))), line)
                case "twice":
                    lines += [line, line]
                case "cut":
                    lines.insert(at, line[: data.draw(st.integers(0, len(line)))])
                case "changed":
                    place = data.draw(st.integers(0, len(line)))
                    lines.insert(at, line[:place] + data.draw(st.characters()) + line[place + 1 :])
                case "value":
                    other = data.draw(st.sampled_from(lines))
                    lines.insert(at, line.partition("=")[0] + "=" + other.partition("=")[2])
        text = "\n".join(lines)
        try:
            conf = policy.parse_conf(text)
        except Refusal as refusal:
            assert refusal.code == SYSTEM_ERROR
            return
        said = {
            key.strip(): value.strip().strip('"')
            for key, _, value in (line.partition("=") for line in text.splitlines())
        }
        for key, value in conf.fields().items():
            if key not in said:
                assert value in (getattr(Conf, key), "verify")
            elif isinstance(value, tuple):
                assert set(value) <= set(said[key].replace(",", " ").split())
            elif isinstance(value, range):
                assert not value or [value.start, value.stop - 1] == [int(gid) for gid in said[key].split("-")]
            elif isinstance(value, bool):
                assert said[key] == ("yes" if value else "no")
            else:
                assert value == type(value)(said[key])
        names = (*conf.user_white_list, *conf.group_white_list, *conf.pool_accounts)
        assert all(re.fullmatch(r"\.?[a-z_][a-z0-9_-]*", name) for name in names)


class TestLists:
    @pytest.mark.parametrize(
        ("account", "patterns", "expected"),
        [
            ("pilot001", (".pilot",), True),
            ("pilot", (".pilot",), False),
            ("pilotx", (".pilot",), False),
            ("pilot001x", (".pilot",), False),
            ("xpilot001", (".pilot",), False),
            ("pilot001\n", (".pilot",), False),
            ("pilot٣", (".pilot",), False),
            ("glexec", (".gl",), False),
            ("factory", ("factory",), True),
            ("factory1", ("factory",), False),
            ("gl001", (), False),
            ("gl001", (".pilot", ".gl"), True),
        ],
    )
    def test_an_account_is_listed_by_name_or_pool(
        self, account: str, patterns: tuple[str, ...], expected: bool
    ) -> None:
        assert policy.listed(account, patterns) is expected


class TestCaller:
    conf = Conf(user_white_list=(".pilot",), group_white_list=("robots",))

    @pytest.mark.parametrize(("name", "groups"), [("pilot001", []), ("factory", ["users", "robots"])])
    def test_named_by_account_or_by_group(self, name: str, groups: list[str]) -> None:
        policy.check_caller(name, groups, self.conf)

    @pytest.mark.parametrize(("name", "groups"), [("alice", ["users"]), ("robots", []), ("root", ["root"])])
    def test_nobody_else_may_call(self, name: str, groups: list[str]) -> None:
        with pytest.raises(Refusal) as caught:
            policy.check_caller(name, groups, self.conf)
        assert caught.value.code == AUTHORISATION_ERROR


class TestTarget:
    conf = Conf(user_white_list=(".pilot",), pool_accounts=(".gl", "root", "pilot001"))

    def test_a_pool_account_is_accepted(self) -> None:
        policy.check_target("gl001", 21001, "pilot001", 20001, self.conf)

    @pytest.mark.parametrize(
        ("name", "uid"),
        [
            ("root", 0),  # even where the configuration names it
            ("gl001", 999),
            ("pilot001", 20001),  # the caller himself
            ("pilot002", 20002),
            ("alice", 1500),
        ],
    )
    def test_no_other_account_is(self, name: str, uid: int) -> None:
        with pytest.raises(Refusal) as caught:
            policy.check_target(name, uid, "pilot001", 20001, self.conf)
        assert caught.value.code == AUTHORISATION_ERROR

    two = Conf(
        user_white_list=(".pilot", ".copilot", "factory"), pool_accounts=(".gl", ".co"),
        caller_pools=(".pilot:.gl", ".copilot:.co"),
    )  # fmt: skip

    @pytest.mark.parametrize(
        ("caller", "name"), [("pilot001", "gl001"), ("copilot001", "co001"), ("factory", "gl001"), ("factory", "co001")]
    )
    def test_a_callers_pool_runs_payloads_of_its_own_pool(self, caller: str, name: str) -> None:
        policy.check_target(name, 21001, caller, 20001, self.two)

    @pytest.mark.parametrize(("caller", "name"), [("pilot001", "co001"), ("copilot001", "gl001")])
    def test_a_callers_pool_runs_no_others_payloads(self, caller: str, name: str) -> None:
        with pytest.raises(Refusal, match=f"{caller} may run payloads of .* only") as caught:
            policy.check_target(name, 21001, caller, 20001, self.two)
        assert caught.value.code == AUTHORISATION_ERROR

    def test_the_group_must_be_one_of_the_account(self) -> None:
        policy.check_group("gl001", 21000, [21000, 21050])
        policy.check_group("gl001", 21050, [21000, 21050])

    @pytest.mark.parametrize("gid", [0, 42, 20000])
    def test_no_other_group_is_taken(self, gid: int) -> None:
        with pytest.raises(Refusal) as caught:
            policy.check_group("gl001", gid, [21000, 0, 42])
        assert caught.value.code == AUTHORISATION_ERROR


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 126", 126),
        ("exit 200", 200),
        ("exit 201", 204),
        ("exit 202", 204),
        ("exit 203", 204),
        ("exit 204", 204),
        ("exit 205", 205),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
    ],
)
def test_exit_codes_of_real_processes(program: str, expected: int) -> None:
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", program], os.environ)
    assert policy.exit_code(os.waitpid(pid, 0)[1]) == expected


class TestEnvironment:
    account: ClassVar = {"name": "gl001", "home": "/home/gl001", "shell": ""}

    def test_nothing_of_the_callers_gets_through(self) -> None:
        conf = Conf(user_white_list=(".pilot",), pool_accounts=(".gl",))
        callers = {"HOME": "/home/pilot001", "SECRET": "x", "LD_PRELOAD": "/evil.so", "GLEXEC_CLIENT_CERT": "/p"}
        assert policy.payload_environment(self.account, conf, callers, "") == {
            "HOME": "/home/gl001",
            "USER": "gl001",
            "LOGNAME": "gl001",
            "SHELL": "/bin/sh",
            "PATH": "/usr/local/bin:/usr/bin:/bin",
        }

    def test_but_what_is_preserved_and_wrapped(self) -> None:
        conf = Conf(user_white_list=(".pilot",), pool_accounts=(".gl",), preserve_env_variables=("LANG", "ABSENT"))
        callers = {"LANG": "C", "GLEXEC_ENV": "abc", "X509_USER_PROXY": "/pilots"}
        made = policy.payload_environment(self.account, conf, callers, "/copy")
        assert (made["LANG"], made["GLEXEC_ENV"], made["X509_USER_PROXY"]) == ("C", "abc", "/copy")
        assert "ABSENT" not in made


class TestLogLine:
    def test_a_field_cannot_forge_another_line_or_field(self) -> None:
        line = policy.record({"id": 'job" exit=0\nglexec: forged\x1b[2J\\', "exit": 203})
        assert line == 'id="job? exit=0?glexec: forged?[2J?" exit=203'

    @given(st.text())
    def test_any_text_stays_one_quoted_field(self, text: str) -> None:
        line = policy.record({"id": text})
        assert line.isprintable()
        assert line.count('"') == 2

    def test_a_dn_stands_there_as_it_is(self) -> None:
        name = r"/DC=test/CN=Robot\/J\xC3\xBCrgen C\+\+"
        assert policy.record({"dn": name, "exit": 0}) == f'dn="{name}" exit=0'
        assert policy.record({"dn": "/CN=a\\", "exit": 0}) == 'dn="/CN=a?" exit=0'

    def test_long_text_is_cut(self) -> None:
        assert len(policy.record({"id": "x" * 100_000})) < 600


HYBRID = (
    "31 30 0:35 / /sys/fs/cgroup/blkio ro,nosuid shared:1 - cgroup cgroup rw,blkio\n"
    "32 30 0:38 / /sys/fs/cgroup/unified rw,nosuid shared:2 - cgroup2 cgroup rw\n"
)
PURE = "32 30 0:38 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


class TestCgroup:
    @pytest.mark.parametrize(
        ("mountinfo", "cgroup", "expected"),
        [
            (PURE, "0::/system.slice/slurmd.service\n", "/sys/fs/cgroup/system.slice/slurmd.service"),
            (HYBRID, "8:pids:/x\n0::/job\n", "/sys/fs/cgroup/unified/job"),
            (PURE, "0::/\n", "/sys/fs/cgroup"),
            (HYBRID, "0::/../../outside\n", ""),
            (HYBRID, "8:pids:/x\n", ""),
            (HYBRID.splitlines()[0] + "\n", "0::/job\n", ""),
            (PURE.replace(" / /", " /docker/1 /"), "0::/docker/1/a\n", "/sys/fs/cgroup/a"),
            (PURE.replace(" / /", " /docker/1 /"), "0::/elsewhere\n", ""),
        ],
    )
    def test_the_callers_own_cgroup_is_found(self, mountinfo: str, cgroup: str, expected: str) -> None:
        assert policy.unified_cgroup(mountinfo, cgroup) == expected


class TestSandbox:
    @pytest.mark.parametrize("name", [".job.ad", ".machine.ad", "_condor_stdout", "_condor_stderr", ".update.ad"])
    def test_htcondors_files_stay(self, name: str) -> None:
        assert policy.stays_callers(name)

    @pytest.mark.parametrize("name", ["job.ad", "condor_stdout", "x509up", "condor_exec.exe", ".job_wrapper_failure"])
    def test_the_jobs_files_go(self, name: str) -> None:
        assert not policy.stays_callers(name)

    def test_the_kernel_takes_the_acl_as_it_is_meant(self, tmp_path: Path) -> None:
        try:
            os.setxattr(tmp_path, policy.ACL_NAME, policy.acl(21001, 7, 5))
        except OSError as error:
            pytest.skip(f"no ACLs on {tmp_path}: {error}")
        assert os.getxattr(tmp_path, policy.ACL_NAME) == policy.acl(21001, 7, 5)
        assert tmp_path.stat().st_mode & 0o777 == 0o750  # the group's bits show the mask; the group itself has none


class TestWrappedEnvironment:
    @given(st.dictionaries(st.binary(min_size=1).filter(lambda name: not {0, 61} & set(name)), st.binary()))
    def test_what_is_wrapped_comes_out(self, environment: dict[bytes, bytes]) -> None:
        environment = {name: value.replace(b"\0", b"") for name, value in environment.items()}
        kept = {
            name: value
            for name, value in environment.items()
            if name.decode(errors="replace") not in wrapenv.ACCOUNTS_OWN and not name.startswith(b"GLEXEC_")
        }
        assert wrapenv.unwrap(wrapenv.wrap(environment)) == kept

    def test_the_accounts_own_variables_do_not(self) -> None:
        wrapped = wrapenv.wrap({b"HOME": b"/pilot", b"X509_USER_PROXY": b"/pilots", b"GLEXEC_ID": b"7", b"A": b"1"})
        assert wrapenv.unwrap(wrapped) == {b"A": b"1"}

    def test_a_bomb_is_refused(self) -> None:
        bomb = base64.b64encode(gzip.compress(b"A=" + bytes(wrapenv.LARGEST))).decode()
        with pytest.raises(ValueError, match="bytes"):
            wrapenv.unwrap(bomb)

    @pytest.mark.parametrize("wrapped", ["x", "QQ==", "H4sIAAAAAAACA3WTw8Pd1tdWvYAAA8RKAACA3O0N="])
    def test_what_is_not_gzip_is_refused(self, wrapped: str) -> None:
        with pytest.raises((ValueError, OSError)):
            wrapenv.unwrap(wrapped)

    @given(st.text())
    def test_any_other_text_is_refused_or_empty(self, text: str) -> None:
        with contextlib.suppress(ValueError, OSError, EOFError):
            assert isinstance(wrapenv.unwrap(text), dict)

    def test_the_two_programs_together(self) -> None:
        """Across two real processes, as the job wrapper uses them."""
        program = "import sys; from pilotbed.glexec.wrapenv import {0} as main; sys.exit(main())"
        base = {"PYTHONPATH": os.pathsep.join(sys.path)}


        def run(env: dict[str, str], main: str, *arguments: str) -> str:
            command = [sys.executable, "-c", program.format(main), *arguments]
            return subprocess.run(command, env=base | env, capture_output=True, text=True, check=True).stdout

        wrapped = run({"A": "1\n2", "HOME": "/x"}, "wrap_main").strip()
        show = ("--", "/bin/sh", "-c", 'printf %s "$A|$HOME|$GLEXEC_ENV|$LC_CTYPE"')
        assert run({"HOME": "/y", "GLEXEC_ENV": wrapped}, "unwrap_main", *show) == "1\n2|/y||"


class TestRecord:
    def test_journal_entry_cannot_be_forged_by_a_value(self) -> None:
        entry = policy.journal_entry({"GLEXEC_ID": "x\nGLEXEC_DN=/forged\n", "PRIORITY": 5})
        value = b"x\nGLEXEC_DN=/forged\n"
        assert entry == (
            b"GLEXEC_ID\n" + len(value).to_bytes(8, "little") + value + b"\n" + b"PRIORITY\n\x01" + bytes(7) + b"5\n"
        )

    @pytest.mark.parametrize(
        ("name", "dn"),
        [
            ("%2fdc%3dtest%2fcn%3dalice%20adams:gridlab", "/dc=test/cn=alice adams"),
            ("%2fcn%3dj%c3%b6rg%3a1:gridlab", "/cn=jörg:1"),
            ("%2", ""),
            ("%zz", ""),
        ],
    )
    def test_lease_names_its_holder(self, name: str, dn: str) -> None:
        assert policy.lease_holder(name) == dn


@pytest.mark.parametrize("late", [b"", b"\x0c"], ids=["no signal", "a signal that nobody has read"])
@pytest.mark.parametrize(
    ("said", "code"), [(policy.STARTED, 7), (policy.REFUSED + bytes([203]) + b"not authorised", 203)]
)
def test_the_exit_code_is_told_though_a_signal_came_too_late(late: bytes, said: bytes, code: int) -> None:
    """Grid Engine sends each signal twice: the second one meets a root part that ends, and resets the connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.send(said)
        if late:
            ours.send(late)
        theirs.close()
        assert front._verdict(ours, code << 8) == code
