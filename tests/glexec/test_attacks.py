"""What a pilot or a payload may try, each with its negative control: the protection taken off, the attack succeeds.

An attack is a function that tells whether it came through. Its control is what has to be changed for that: a line of
the configuration, or a line of glexec itself, patched in the bed.
"""

import contextlib
import json
import re

import pytest
from glexecbed import GLEXEC, OTHER_PILOT, PILOT, ROOT_PART, until

SUDOERS = "/etc/sudoers.d/glexec"
ATTACKS = {}


def attack(*controls):
    """Register an attack; `controls`: functions of the bed that return what takes one protection off."""
    def register(function):
        ATTACKS[function.__name__.replace("_", " ")] = function, controls
        return function

    return register


def patched(module, old, new):
    return lambda bed: bed.patched(module, old, new)


def configured(**keys):
    return lambda bed: bed.configured(**keys)


def replaced(path, old, new):
    def edit(text):
        assert text.count(old) == 1
        return text.replace(old, new)

    return lambda bed: bed.changed(path, edit)


def secret_of(pilot, owner=PILOT):
    """A file that nobody but `owner` may read."""
    return pilot.bed.write(f"{pilot.bed.directory(owner)}/secret", "the secret\n", owner)


def owner(pilot, path):
    return pilot.bed.root(f"stat -c %U {path}").strip()


def payload(pilot, program, *, prepare="", **options):
    """Run a Python program as payload; `prepare`: what the pilot's process does before it becomes glexec."""
    pilot.bed.write(f"{pilot.work}/payload.py", program, mode=0o644)
    command = ["glexec", "/usr/bin/python3", "-I", f"{pilot.work}/payload.py"]
    pilot.bed.write(f"{pilot.work}/pilot.py", f"import os\n{prepare}\nos.execv('{GLEXEC}', {command})", mode=0o644)
    return pilot.bed.run("/usr/bin/python3", f"{pilot.work}/pilot.py", env=pilot.environment(**options))


# -- environment, descriptors --------------------------------------------------------------------------------------


def trap(pilot):
    """A module that shows who imports it."""
    program = f"import os; os.close(os.open('{pilot.work}/root-was-here', os.O_CREAT))"
    pilot.bed.write(f"{pilot.work}/struct.py", program)


@attack(
    replaced(ROOT_PART, "python3 -IS", "python3"),
    replaced(SUDOERS, 'env_keep = "', 'env_keep = "PYTHONPATH '),
)
def interpreter_variable_makes_root_import_the_pilots_module(pilot):
    trap(pilot)
    pilot.glexec(PYTHONPATH=pilot.work)
    made = f"{pilot.work}/root-was-here"
    return pilot.bed.path(made).exists() and owner(pilot, made) == "root"


@attack(
    replaced(SUDOERS, 'env_keep = "', 'env_keep = "BASH_ENV '),
    patched("policy", "    return kept | made | (", "    return dict(callers) | made | ("),
)
def shell_variable_reaches_the_payload(pilot):
    return "BASH_ENV=" in pilot.glexec("/usr/bin/env", BASH_ENV="/x").out


@attack(
    patched("root", "    os.closerange(CONTROL + 1, 0x7FFFFFFF)\n", ""),
    patched("front", "CONTROL + 1", "CONTROL + 9"),
)
def descriptor_of_the_pilots_reaches_the_payload(pilot):
    opened = f"os.dup2(os.open({secret_of(pilot)!r}, os.O_RDONLY), 9)"
    done = payload(pilot, "import os; print(os.pread(9, 99, 0))", prepare=opened)
    return "the secret" in done.out


@attack(patched("apart", "socket.MSG_CMSG_CLOEXEC", "0"))
def descriptor_of_the_root_parts_reaches_the_payload(pilot):
    program = "import os; print(*os.listdir('/proc/self/fd'))"
    done = payload(pilot, program, GLEXEC_SANDBOX=pilot.work, GLEXEC_SOURCE_PROXY=pilot.proxy)
    assert done.code == 0, done
    return set(done.out.split()) != {"0", "1", "2", "3"}  # 3: the directory that it lists


@attack(patched("root", "os.set_inheritable(CONTROL, False)", "os.set_inheritable(CONTROL, True)"))
def payload_speaks_to_the_front_end_as_if_it_were_root(pilot):
    program = "import socket; socket.socket(fileno=3).send(b'R\\xcbforged')"
    done = payload(pilot, program)
    return "glexec: forged" in done.err


@attack(patched("tree", "if KEYCTL and _libc.syscall(KEYCTL, _JOIN_SESSION_KEYRING, None) < 0:", "if False:"))
def payload_reads_the_pilots_session_keyring(pilot):
    setup = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.syscall(250, 1, None) > 0, ctypes.get_errno()\n"
        "assert libc.syscall(248, b'user', b'pilots', b'the secret', 10, -3) > 0, ctypes.get_errno()"
    )
    program = (
        "import ctypes; libc = ctypes.CDLL(None)\n"
        "key = libc.syscall(250, 10, -3, b'user', b'pilots', 0)\n"
        "text = ctypes.create_string_buffer(99); libc.syscall(250, 11, key, text, 99); print(text.value)"
    )
    return "the secret" in payload(pilot, program, prepare=setup).out


@attack(
    patched("root", "(0, 0) if limit == resource.RLIMIT_CORE else ", ""),
    replaced(SUDOERS, "env_reset,", "env_reset, rlimit_core=user,"),
)
def root_part_dumps_core_with_a_private_key(pilot):
    script = "grep core /proc/$(pgrep -o -u root -f ^/usr/bin/python3.-I.*glexec-root)/limits"
    run = 'ulimit -c unlimited; exec glexec /bin/sh -c "$0"'
    done = pilot.bed.run("sh", "-c", run, script, env=pilot.environment())
    assert done.out.startswith("Max core file size"), done
    return not re.search("Max core file size +0 +0 ", done.out)


# -- who calls, who is it ------------------------------------------------------------------------------------------


@attack(patched("root", 'environment.get("SUDO_UID", "")', 'environment.get("GLEXEC_ID", "")'))
def pilot_says_that_it_is_another_pilot(pilot):
    other = pilot.bed.write(f"{pilot.work}/others", pilot.bed.proxy("bob"), OTHER_PILOT)
    uid = str(pilot.bed.ids(OTHER_PILOT)[0])
    done = pilot.glexec(GLEXEC_CLIENT_CERT=other, GLEXEC_ID=uid, SUDO_UID=uid, SUDO_USER=OTHER_PILOT)
    return done.code == 0


@attack(replaced(SUDOERS, f"NOPASSWD: {ROOT_PART}", "NOPASSWD: ALL"))
def pilot_has_sudo_run_something_else(pilot):
    return pilot.bed.run("sudo", "-n", "/usr/bin/id", "-u").out == "0\n"


@attack(replaced(SUDOERS, "!setenv", "setenv"), replaced(ROOT_PART, "python3 -IS", "python3"))
def pilot_sets_a_variable_for_the_root_part(pilot):
    trap(pilot)
    pilot.bed.run("sudo", "-n", f"PYTHONPATH={pilot.work}", ROOT_PART, "/bin/true")
    return pilot.bed.path(f"{pilot.work}/root-was-here").exists()


CHECK_TARGET = "    policy.check_target(account.pw_name, account.pw_uid, caller.pw_name, caller.pw_uid, conf)\n"


@attack(patched("root", CHECK_TARGET, ""),
        patched("root", "    policy.check_group(account.pw_name, gid, groups)\n", ""))  # fmt: skip
def captured_mapper_answers_with_another_account(pilot):
    uid, gid = pilot.bed.ids(OTHER_PILOT)
    with pilot.bed.patched("mapper", "_packed(found.uid, found.gid,", f"_packed({uid}, {gid},"):
        return f"({OTHER_PILOT})" in pilot.glexec().out


@attack(patched("apart", "            os.closerange(_CHANNEL + 1, 0x7FFFFFFF)\n", ""),
        patched("apart", "os.dup2(theirs.fileno(), _CHANNEL)", "os.dup2(theirs.fileno(), 63)"),
        patched("apart", "socket.socket(fileno=_CHANNEL)", "socket.socket(fileno=63)"))  # fmt: skip
def captured_mapper_holds_the_root_parts_socket(pilot):
    look = "import socket; return _packed(21001, 21000, str(socket.socket(fileno=3).type), ())"
    with pilot.bed.patched("mapper", "    return _packed(found.uid, found.gid, dn, lcmaps.fqans())", f"    {look}"):
        return pilot.glexec().field("dn") == "5"  # SOCK_SEQPACKET


# -- proxies: links and races --------------------------------------------------------------------------------------

AS_ROOT = (
    patched("monitor", 'with open(open_as(owner, path, os.O_RDONLY), "rb") as file:', 'with open(path, "rb") as file:'),
    patched("monitor", " or found.st_uid != owner.pw_uid", ""),
)


@attack(*AS_ROOT)
def link_to_another_pilots_proxy(pilot):
    pilot.bed.write(f"{pilot.work}/others", pilot.bed.proxy("bob"), OTHER_PILOT)
    pilot.bed.root(f"ln -s others {pilot.work}/link")
    return "/CN=Bob" in pilot.glexec(GLEXEC_CLIENT_CERT=f"{pilot.work}/link").line()


@attack(*AS_ROOT)
def hard_link_to_another_pilots_proxy(pilot):
    pilot.bed.write(f"{pilot.work}/others", pilot.bed.proxy("bob"), OTHER_PILOT)
    pilot.bed.root(f"ln {pilot.work}/others {pilot.work}/link")  # as where fs.protected_hardlinks is off
    return "/CN=Bob" in pilot.glexec(GLEXEC_CLIENT_CERT=f"{pilot.work}/link").line()


SWAP = """
import os
os.chdir({0!r})
print("swapping", flush=True)
while True:
    for name in ("mine", "link"):
        os.link(name, "new", follow_symlinks=False)
        os.rename("new", "swapped")
"""


@attack(*AS_ROOT)
def proxy_swapped_for_a_link_while_it_is_looked_at(pilot):
    directory = pilot.bed.directory()
    pilot.bed.write(f"{directory}/mine", pilot.bed.proxy())
    other = pilot.bed.write(f"{pilot.bed.directory(OTHER_PILOT, 0o700)}/others", pilot.bed.proxy("bob"), OTHER_PILOT)
    pilot.bed.root(f"ln -s {other} {directory}/link; chown -h {PILOT} {directory}/link")
    swapper = pilot.bed.start("python3", "-c", SWAP.format(directory), user=PILOT)
    assert swapper.stdout.readline() == "swapping\n", swapper.stderr.read()
    try:
        found = [pilot.glexec(GLEXEC_CLIENT_CERT=f"{directory}/swapped") for _ in range(8)]
    finally:
        pilot.bed.root("pkill -f '[s]wapped' || true")
        swapper.wait()
    return any("/CN=Bob" in done.line() for done in found)


@attack(patched("monitor", "    run_as(order.target, lambda: target.write_proxy(", "    target.write_proxy("),
        patched("monitor", "pem, sandbox), order.groups)", "pem, sandbox)"))  # fmt: skip
def target_proxy_written_where_only_root_may(pilot):
    path = "/etc/cron.d-entry"
    pilot.glexec(GLEXEC_SOURCE_PROXY=pilot.proxy, GLEXEC_TARGET_PROXY=path)
    made = pilot.bed.path(path).exists()
    pilot.bed.path(path).unlink(missing_ok=True)
    return made


# -- sandbox -------------------------------------------------------------------------------------------------------


FOLLOW = (
    patched("sandbox", "_HANDLE = os.O_PATH | os.O_NOFOLLOW |", "_HANDLE = os.O_PATH |"),
    patched("sandbox", "_STRICTLY_BELOW = _BELOW | 0x04 | 0x01", "_STRICTLY_BELOW = 0"),
)


@attack(*FOLLOW)
def link_in_the_sandbox_gets_the_payload_a_file_of_the_pilots(pilot):
    secret = secret_of(pilot)
    pilot.bed.root(f"ln -s {secret} {pilot.work}/link && chown -h {PILOT} {pilot.work}/link")
    return "the secret" in pilot.sh(f"cat {secret}", GLEXEC_SANDBOX=pilot.work).out


@attack(*FOLLOW, patched("sandbox", "if found.st_uid != caller or (", "if ("))
def directory_of_the_sandbox_is_a_link_to_a_third_ones(pilot):
    victim = pilot.bed.directory(OTHER_PILOT)
    pilot.bed.root(f"ln -s {victim} {pilot.work}/d")
    pilot.sh("true", GLEXEC_SANDBOX=pilot.work)
    return owner(pilot, victim) != OTHER_PILOT


@attack(patched("sandbox", "(stat.S_ISREG(mode) and found.st_nlink == 1)", "stat.S_ISREG(mode)"))
def hard_link_in_the_sandbox_gets_the_payload_a_file_of_the_pilots(pilot):
    secret = secret_of(pilot)
    pilot.bed.root(f"ln {secret} {pilot.work}/link")
    return "the secret" in pilot.sh("cat link", GLEXEC_SANDBOX=pilot.work).out


@attack(patched("sandbox", 'for where in links if not self._leads_inside(where)}', "for where in ()}"))
def link_left_in_the_sandbox_for_the_starter_to_follow(pilot):
    secret = secret_of(pilot)
    done = pilot.sh(f"ln -s {secret} output", GLEXEC_SANDBOX=pilot.work)
    assert done.code == 0
    return pilot.bed.run("cat", f"{pilot.work}/output").out == "the secret\n"


@attack(patched("sandbox", "stat.S_IMODE(found.st_mode) & 0o755 |", "stat.S_IMODE(found.st_mode) |"),
        patched("sandbox", """            os.chmod(_handle(fd), stat.S_IMODE(found.st_mode)""",
                """            os.chown(_handle(fd), self.found.st_uid, -1)
            os.chmod(_handle(fd), stat.S_IMODE(found.st_mode)"""),
        patched("sandbox", "        os.chown(_handle(fd), self.found.st_uid, self.found.st_gid)\n", ""))  # fmt: skip
def set_uid_program_left_in_the_sandbox_becomes_the_pilots(pilot):
    assert pilot.sh("cp /usr/bin/id program; chmod 4755 program", GLEXEC_SANDBOX=pilot.work).code == 0
    pilot.bed.root(f"chmod 755 {pilot.work}")
    return f"euid={pilot.bed.ids(PILOT)[0]}" in pilot.bed.run(f"{pilot.work}/program", user="nobody").out


EXCHANGE = """
import ctypes, os
os.chdir({0!r})
print("swapping", flush=True)
while True:
    ctypes.CDLL(None).renameat2(-100, b"mine", -100, b"swapped", 2)  # AT_FDCWD, RENAME_EXCHANGE
"""


@attack(patched("root", "open_as(caller, path, os.O_RDONLY | os.O_DIRECTORY), caller.pw_uid",
                "os.open(path, os.O_RDONLY | os.O_DIRECTORY), caller.pw_uid"),
        patched("sandbox", "        if self.found.st_uid != caller_uid:\n", "        if False:\n"))  # fmt: skip
def sandbox_swapped_for_a_link_while_it_is_looked_at(pilot):
    directory, other = pilot.bed.directory(), pilot.bed.directory(OTHER_PILOT, 0o700)
    pilot.bed.write(f"{other}/secret", "the secret\n", OTHER_PILOT)
    pilot.bed.root(f"cd {directory}; install -d -o {PILOT} mine; ln -s {other} swapped; chown -h {PILOT} swapped")
    swapper = pilot.bed.start("python3", "-c", EXCHANGE.format(directory), user=PILOT)
    assert swapper.stdout.readline() == "swapping\n", swapper.stderr.read()
    try:
        return any("the secret" in pilot.sh("cat secret", GLEXEC_SANDBOX=f"{directory}/swapped").out for _ in range(12))
    finally:
        pilot.bed.root("pkill -f '[r]enameat2' || true")
        swapper.wait()


# -- what a payload does to others ---------------------------------------------------------------------------------

REACH = """
import ctypes, json, os, sys
libc, found = ctypes.CDLL(None), []
def attempt(what, action):
    try:
        found.append(what) if action() not in (-1, None) else None
    except OSError:
        pass
own = os.getpid()
for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
    if pid == own:
        continue
    attempt(f"environ {pid}", lambda: len(open(f"/proc/{pid}/environ", "rb").read()) or None)
    attempt(f"mem {pid}", lambda: open(f"/proc/{pid}/mem", "rb").fileno())
    attempt(f"fd {pid}", lambda: len(os.listdir(f"/proc/{pid}/fd")))
    attempt(f"signal {pid}", lambda: os.kill(pid, 0) or True)
    attempt(f"ptrace {pid}", lambda: libc.ptrace(0x4206, pid, 0, 0))  # PTRACE_SEIZE
    for path in sys.argv[1:]:
        attempt(f"read {path}", lambda: open(path).read())
for path in sys.argv[1:]:
    attempt(f"read {path}", lambda: open(path).read())
    attempt(f"write {path}", lambda: open(path, "a").write(""))
    attempt(f"unlink {path}", lambda: os.unlink(path) or True)
print(json.dumps(found))
"""


def reach(pilot, *paths, **options):
    """What alice's payload gets at: of every process that is there, and of these files."""
    pilot.bed.write(f"{pilot.work}/reach.py", REACH, mode=0o644)
    done = pilot.glexec("/usr/bin/python3", "-I", f"{pilot.work}/reach.py", *paths, **options)
    assert done.code == 0, done
    return set(json.loads(done.out))


@attack(configured(logging_only="yes"))
def payload_reaches_its_pilot(pilot):
    secret = secret_of(pilot)
    process = pilot.bed.start("sleep", "1000")
    try:
        pid = int(until("the pilot's process", lambda: pilot.bed.root("pgrep -x sleep || true")))
        found = reach(pilot, secret, pilot.proxy)
    finally:
        pilot.bed.root("pkill -x sleep")
        process.wait()
    if found:
        assert {f"environ {pid}", f"signal {pid}", f"read {secret}", f"unlink {pilot.proxy}"} <= found
    return bool(found)


@attack(patched("mapper", "_packed(found.uid, found.gid,", "_packed(21005, 21000,"))
def payload_reaches_another_users_payload_in_the_same_pilot(pilot):
    sandbox, second = pilot.bed.directory(), pilot.bed.write(f"{pilot.work}/bobs", pilot.bed.proxy("bob"))
    process = pilot.bed.start(
        GLEXEC, "/bin/sh", "-c", "umask 0; echo 1 > file; echo started; exec sleep 1000",
        env=pilot.environment(GLEXEC_CLIENT_CERT=second, GLEXEC_SANDBOX=sandbox, GLEXEC_SOURCE_PROXY=second),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "started\n"
        pid = int(pilot.bed.root("pgrep -x sleep"))
        copy = pilot.bed.root("ls /tmp/x509up_glexec_*").strip()
        found = reach(pilot, f"{sandbox}/file", copy, second)
    finally:
        pilot.bed.root("pkill -x sleep")
        pilot.bed.finish(process)
    if found:
        assert {f"environ {pid}", f"signal {pid}", f"read {sandbox}/file", f"read {copy}"} <= found
    return bool(found)


# -- what a payload leaves -----------------------------------------------------------------------------------------

UNSWEPT = configured(sweep_directories="")


@attack(UNSWEPT)
def set_uid_program_left_in_tmp_makes_bob_alice(pilot):
    done = pilot.sh("cp /usr/bin/id /tmp/program; chmod 4755 /tmp/program; id -un")
    bob = pilot.bed.write(f"{pilot.work}/bobs", pilot.bed.proxy("bob"))
    found = pilot.sh("/tmp/program", GLEXEC_CLIENT_CERT=bob).out
    return f"({done.out.strip()})" in found


@attack(UNSWEPT)
def file_left_in_tmp_and_shared_memory(pilot):
    pilot.sh("mkdir -p /tmp/a/b /var/tmp/c /dev/shm/d; chmod 0 /tmp/a/b /dev/shm/d; touch /tmp/.hidden")
    return bool(pilot.bed.left())


@attack(UNSWEPT)
def system_v_objects_left(pilot):
    calls = {"shmget": (4096, 0o1666), "semget": (1, 0o1666), "msgget": (0o1666,)}
    program = f"import ctypes\nfor get, how in {calls}.items(): assert getattr(ctypes.CDLL(None), get)(47, *how) >= 0"
    assert payload(pilot, program).code == 0
    return len(pilot.bed.left()) == 3


FILL = """
import os, sys
os.mkdir("d")
os.chdir("d")
made = 0
try:
    while True:
        with open(str(made), "wb") as file:
            file.write(bytes(int(sys.argv[1])))
        made += 1
except OSError as error:
    print(error.strerror)
os.chmod("../d", 0)
"""


def filled(pilot, directory, size, **options):
    """Have a payload fill a small file system at `directory`: with files of this size, in a closed directory."""
    pilot.bed.write(f"{pilot.work}/fill.py", FILL, mode=0o644)
    done = pilot.sh(f"cd {directory} && exec python3 -I {pilot.work}/fill.py {size}", **options)
    assert (done.code, done.out) == (0, "No space left on device\n"), done


@contextlib.contextmanager
def small(bed, directory, mode, owner="root"):
    uid, gid = bed.ids(owner)
    bed.root(f"mount -t tmpfs -o size=256k,nr_inodes=64,mode={mode},uid={uid},gid={gid} tmpfs {directory}")
    try:
        yield directory
    finally:
        bed.root(f"umount {directory}")


def tmp_is_full_for_the_next_user(pilot, size):
    bob = pilot.bed.write(f"{pilot.work}/bobs", pilot.bed.proxy("bob"))
    with small(pilot.bed, "/tmp", 1777):
        filled(pilot, "/tmp", size)
        return pilot.sh("echo output >/tmp/file", GLEXEC_CLIENT_CERT=bob).code != 0


@attack(UNSWEPT)
def tmp_filled_with_bytes_for_the_next_user(pilot):
    return tmp_is_full_for_the_next_user(pilot, 16384)


@attack(UNSWEPT)
def tmp_filled_with_inodes_for_the_next_user(pilot):
    return tmp_is_full_for_the_next_user(pilot, 0)


def sandbox_stays_full(pilot, size):
    with small(pilot.bed, pilot.bed.directory(), 711, PILOT) as sandbox:
        filled(pilot, ".", size, GLEXEC_SANDBOX=sandbox)
        emptied = f"cd {sandbox} && find . -mindepth 1 -delete && echo next >file && rm file"
        return pilot.bed.run("sh", "-c", emptied, user=PILOT).code != 0


RETURN = "                self._return(fd, found)\n            elif stat"
KEPT = patched("sandbox", RETURN, RETURN.replace("self._return(fd, found)", "pass"))


@attack(KEPT)
def sandbox_filled_with_bytes_for_good(pilot):
    return sandbox_stays_full(pilot, 16384)


@attack(KEPT)
def sandbox_filled_with_inodes_for_good(pilot):
    return sandbox_stays_full(pilot, 0)


@contextlib.contextmanager
def everybody_allowed(bed):
    """Debian without the role: no list of who may use cron, and of at only one of system accounts who may not."""
    bed.root("cd /etc; for f in cron at; do mv $f.allow $f.kept; done")
    try:
        yield
    finally:
        bed.root("cd /etc; for f in cron at; do mv $f.kept $f.allow; done")


def job_is_left(pilot, command):
    account = pilot.sh(f"{command} >/dev/null 2>&1; id -un").out.strip()
    left = pilot.bed.root(f"find /var/spool/cron -type f -user {account}").split()
    pilot.bed.root(f"rm -f {' '.join(left)}")
    return bool(left)


@attack(everybody_allowed)
def job_left_with_cron(pilot):
    return job_is_left(pilot, "echo '* * * * * id' | crontab -")


@attack(everybody_allowed)
def job_left_with_at(pilot):
    return job_is_left(pilot, "echo id | at now + 1 hour")


DAEMON = "(trap '' TERM HUP INT; setsid setsid sleep 1001 </dev/null >/dev/null 2>&1 &) ; sleep 0.2"
SHORT = patched("tree", "PATIENCE = 10.0", "PATIENCE = 0.5")


def daemon(pilot, cgroups, tracking):
    done = pilot.sh(DAEMON, cgroups=cgroups)
    assert done.field("tracking") == tracking
    return any("sleep 1001" in args for _, args in pilot.bed.processes().values())


@attack(SHORT, patched("tree", '            _write(f"{cgroup}/cgroup.kill", "1")\n', ""))
def daemon_outlives_its_payload_in_a_cgroup(pilot):
    return daemon(pilot, "writable", "cgroup")


NO_NAMESPACE = patched("tree", '            _checked("unshare", _CLONE_NEWPID)\n', "            pass\n")


@attack(SHORT, NO_NAMESPACE)
def daemon_outlives_its_payload_where_cgroups_are_read_only(pilot):
    return daemon(pilot, "read-only", "pid namespace")


@attack(SHORT, NO_NAMESPACE)
def daemon_outlives_its_payload_where_there_are_no_cgroups(pilot):
    return daemon(pilot, "absent", "pid namespace")


@contextlib.contextmanager
def delegated(bed):
    """The mistake that lets a payload out: cgroup.procs of the job and of a neighbour are open to all."""
    bed.root("cd /sys/fs/cgroup/job; mkdir out; chmod 666 cgroup.procs out/cgroup.procs")
    try:
        yield
    finally:
        bed.clear()
        bed.root("chmod 644 /sys/fs/cgroup/job/cgroup.procs")


@attack(delegated)
def payload_leaves_its_cgroup(pilot):
    tried = "for d in /sys/fs/cgroup /sys/fs/cgroup/job /sys/fs/cgroup/job/out; do echo $$ > $d/cgroup.procs; done"
    mkdir = "mkdir /sys/fs/cgroup/job/*/mine /sys/fs/cgroup/job/mine"
    pilot.sh(f"({tried}; {mkdir}) 2>/dev/null; {DAEMON}")
    return any("sleep 1001" in args for _, args in pilot.bed.processes().values())


BOMB = """
import os, time
made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            os.setsid(); time.sleep(1000)
        made += 1
    except BlockingIOError:
        break
print(made, flush=True)
"""


@attack(configured(payload_processes="0"))
def fork_bomb_fills_the_node(pilot):
    limited = pilot.bed.configured(payload_processes="50")
    with contextlib.nullcontext() if "payload_processes" in pilot.bed.path("/etc/glexec.conf").read_text() else limited:
        return int(payload(pilot, BOMB).out) >= 200


@attack(patched("monitor", "if asked is None or peers.caller in ready:", "if False:"),
        patched("monitor", "(ended, peers.control.fileno(), peers.caller, peers.supervisor,",
                "(ended, peers.supervisor,"))  # fmt: skip
def payload_outlives_its_caller_whose_pid_is_used_again(pilot):
    process = pilot.bed.start(GLEXEC, "/bin/sh", "-c", "echo started; exec sleep 1001", env=pilot.environment())
    assert process.stdout.readline() == "started\n"
    front = int(pilot.bed.root(f"pgrep -u {PILOT} -f 'sbin/glexec /bin/sh'"))
    again = f"kill -9 {front}; while [ -d /proc/{front} ]; do :; done; echo {front - 1} > /proc/sys/kernel/ns_last_pid"
    pilot.bed.root(f"{again}; setpriv --reuid {PILOT} --regid glpilot --clear-groups sleep 3 & wait")
    process.wait()
    return any("sleep 1001" in args for _, args in pilot.bed.processes().values())


# -- the tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails_and_its_control_succeeds(name, pilot):
    assert not ATTACKS[name][0](pilot)


@pytest.mark.leaves
@pytest.mark.parametrize("name", ATTACKS)
def test_control_without_the_protection_it_succeeds(name, pilot):
    function, controls = ATTACKS[name]
    with contextlib.ExitStack() as stack:
        for control in controls:
            stack.enter_context(control(pilot.bed))
        assert function(pilot)
