"""A renewed proxy on its way from A-REX's files to those of its job."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from pilotbed_suite import CHECKOUT

JOB, DELEGATION = "0123456789ab", "d44866b723c6"
PROGRAM = CHECKOUT / "roles/ce_arc/files/usr/libexec/pilotbed/arc-job-proxies"
#: nobody's, as a job's account.
OTHER = 65534


def load() -> ModuleType:
    specification = importlib.util.spec_from_loader(
        "arc_job_proxies", SourceFileLoader("arc_job_proxies", str(PROGRAM))
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


program = load()


def pem(content: str) -> str:
    return f"-----BEGIN CERTIFICATE-----\n{content}\n-----BEGIN RSA PRIVATE KEY-----\n"


class Arex:
    """Control and session directory of one job."""

    def __init__(self, directory: Path, owner: int) -> None:
        self.control, self.session, self.owner = directory / "control", directory / "session" / JOB, owner
        self.known: dict[str, int] = {}
        self.said: dict[str, str] = {}
        self.files = self.control / "jobs/012/345/678/9ab"
        self.delegation = self.control / "delegations/d44/866/b72/3c6"
        for path in (self.files, self.delegation.parent, self.session, self.control / "processing"):
            path.mkdir(parents=True)
        os.chown(self.session, owner, owner)
        self.status("INLRMS")
        self.note(f"args=a=b\ndelegationid={DELEGATION}\nvoms=/a\nvoms=/b\nsessiondir={self.session}\n")
        self._write(self.files / "proxy", "the first one, for ever")
        self.proxy("first")
        self.copy(pem("first"))

    def status(self, word: str) -> None:
        (self.control / "processing" / f"{JOB}.status").write_text(f"{word}\n")

    def _write(self, path: Path, content: str) -> None:
        path.write_text(content)
        path.chmod(0o600)
        os.chown(path, self.owner, self.owner)

    def note(self, content: str) -> None:
        (self.files / "local").write_text(content)

    def proxy(self, content: str) -> None:
        """Renew the delegation, which is root's."""
        before = self.delegation.stat().st_mtime_ns if self.delegation.exists() else 0
        self.delegation.write_text(pem(content))
        os.utime(self.delegation, ns=(before + 10**9, before + 10**9))

    def copy(self, content: str) -> None:
        self._write(self.session / "user.proxy", content)

    def look(self) -> str:
        """Look once; return what the job has then."""
        program.look(self.control, self.known, self.said)
        path = self.session / "user.proxy"
        return path.read_text().split("\n")[1] if path.is_file() else ""


@pytest.fixture
def arex(tmp_path: Path) -> Arex:
    if os.geteuid() == 0:
        for path in (tmp_path, *tmp_path.parents):
            if not path.stat().st_mode & 0o001:
                path.chmod(path.stat().st_mode | 0o011)
    return Arex(tmp_path, OTHER if os.geteuid() == 0 else os.geteuid())


def test_a_renewed_proxy_replaces_the_jobs_copy(arex: Arex, capsys: pytest.CaptureFixture[str]) -> None:
    assert arex.look() == "first"
    arex.proxy("second")
    assert arex.look() == "second"
    found = (arex.session / "user.proxy").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (arex.owner, found.st_gid, 0o600)
    assert capsys.readouterr().out == f"job-proxy-replaced job={JOB}\n"
    assert [path.name for path in arex.session.iterdir()] == ["user.proxy"]


def test_one_that_was_renewed_before_it_was_first_seen_is_replaced(arex: Arex) -> None:
    arex.proxy("second")
    assert arex.look() == "second"


def test_what_the_job_has_made_of_its_copy_is_left_until_there_is_another(arex: Arex) -> None:
    arex.look()
    arex.copy(pem("its own"))
    assert arex.look() == "its own"
    arex.proxy("second")
    assert arex.look() == "second"


@pytest.mark.parametrize("word", ["ACCEPTED", "SUBMIT", "FINISHING", "", "INLRMSX"])
def test_a_job_that_the_batch_system_has_not_is_left_alone(arex: Arex, word: str) -> None:
    arex.status(word)
    arex.proxy("second")
    assert arex.look() == "first"


def test_a_job_without_a_copy_gets_none(arex: Arex) -> None:
    (arex.session / "user.proxy").unlink()
    arex.proxy("second")
    assert arex.look() == ""
    assert [*arex.session.iterdir()] == []


def test_a_key_without_its_certificate_is_no_proxy_yet(arex: Arex) -> None:
    arex.look()
    arex.delegation.write_text("-----BEGIN RSA PRIVATE KEY-----\n")
    assert arex.look() == "first"
    arex.proxy("second")
    assert arex.look() == "second"


DAMAGES = ("no description", "no session in it", "odd delegation", "no delegation", "no account", "no directory")


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_job_is_said_once(arex: Arex, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    arex.proxy("second")
    if damage == "no description":
        (arex.files / "local").unlink()
    elif damage == "no session in it":
        arex.note(f"delegationid={DELEGATION}\n\xff")
    elif damage == "odd delegation":
        arex.note(f"delegationid=../../../etc/passwd\nsessiondir={arex.session}\n")
    elif damage == "no delegation":
        arex.delegation.unlink()
    elif damage == "no account":
        (arex.files / "proxy").unlink()
    else:
        arex.note(f"delegationid={DELEGATION}\nsessiondir={arex.session}/gone\n")
    for _ in range(3):
        arex.look()
    said = capsys.readouterr().err
    assert said.count("job-proxy-failed") == (0 if damage == "no directory" else 1), said


@pytest.mark.parametrize("name", ["user.proxy", ".user.proxy.new"])
def test_a_pipe_in_the_way_keeps_nobody_waiting(arex: Arex, name: str) -> None:
    (arex.session / name).unlink(missing_ok=True)
    os.mkfifo(arex.session / name)
    os.chown(arex.session / name, arex.owner, arex.owner)
    arex.proxy("second")
    assert arex.look() == ("" if name == "user.proxy" else "second")


def test_a_directory_that_does_not_answer_is_given_up_with_all_that_asked(
    arex: Arex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job makes a pipe of it after it was looked at; the others come first then."""
    trap = "user.proxy && mkfifo .trap && cat .trap"
    monkeypatch.setattr(program, "REPLACE", program.REPLACE.replace("user.proxy", trap, 1))
    monkeypatch.setattr(program, "DEADLINE", 1)
    assert arex.look() == "first"
    assert "does not answer within 1 s" in capsys.readouterr().err
    left = subprocess.run(["pgrep", "-u", str(arex.owner), "-fx", "cat .trap"], capture_output=True, check=False)
    assert left.stdout == b""
    seen = []
    monkeypatch.setattr(program, "running", lambda _control: [JOB, "another"])
    monkeypatch.setattr(program, "described", lambda _control, job: seen.append(job) or {})
    with pytest.raises(KeyError):
        arex.look()
    assert seen == ["another"]


def test_a_job_is_forgotten_with_its_end(arex: Arex) -> None:
    arex.look()
    assert arex.known
    (arex.control / "processing" / f"{JOB}.status").unlink()
    arex.look()
    assert arex.known == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other accounts: needs root")
def test_a_link_of_the_jobs_leads_nowhere_that_the_account_may_not_go(arex: Arex, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("root's")
    victim.chmod(0o600)
    for name in (".user.proxy.new", "user.proxy"):
        (arex.session / name).unlink(missing_ok=True)
        (arex.session / name).symlink_to(victim)
    arex.proxy("second")
    program.look(arex.control, arex.known, arex.said)
    assert victim.read_text() == "root's"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other accounts: needs root")
def test_no_proxy_is_written_as_root(arex: Arex, capsys: pytest.CaptureFixture[str]) -> None:
    arex.proxy("second")
    os.chown(arex.files / "proxy", 0, 0)  # by its owner the account is known
    assert arex.look() == "first"
    assert "root's" in capsys.readouterr().err


def test_paths_are_arcs_own() -> None:
    """The shell function of ARC 7.0.0, as it is in lrms_common.sh."""
    expression = ["-e", r"s#\(.\{3\}\)#\1/#3", "-e", r"s#\(.\{3\}\)#\1/#2", "-e", r"s#\(.\{3\}\)#\1/#1", "-e", "s#$#/#"]
    for job in (JOB, "abcdefghi0"):
        done = subprocess.run(["sed", *expression], input=job, capture_output=True, text=True, check=True)
        assert str(program.path_of(Path("/c"), job)) == f"/c/{done.stdout}".rstrip("/")
