"""Question 3: what a payload has from its pilot."""

import re

import pytest
from pilotbed_suite.support import work_dirs


@pytest.mark.check("D3.3")
def test_no_secret_of_the_pilots_is_in_the_environment(running):
    environment = dict(line.split("=", 1) for line in running.has("env.txt").splitlines() if "=" in line)
    assert environment["X509_USER_PROXY"], "control: it has one"
    assert not [value for value in environment.values() if "cred/pilot.pem" in value or "PRIVATE KEY" in value]
    assert not [name for name in environment if re.search("TOKEN|SECRET|PASSWORD|_CONDOR_SEC", name)]
    pilots = {f"{place}/cred/pilot.pem" for place in work_dirs(running.worker)}
    assert environment["X509_USER_PROXY"] not in pilots


@pytest.mark.check("D3.3")
def test_no_file_of_the_pilots_is_open(running):
    opened = re.findall(r" \d+ -> (.*)", running.has("fd.txt"))
    sandbox = next(path for path in opened if path.endswith("/fd.txt")).removesuffix("fd.txt")
    assert [path for path in opened if path != "/dev/null" and not path.startswith(sandbox)] == []


@pytest.mark.check("D3.3")
def test_what_it_writes_is_not_for_others(running):
    assert int(running.has("umask.txt"), 8) & 0o002, "others could write"
    limits = running.has("limits.txt")
    core = re.search(r"Max core file size +(\S+)", limits)
    assert core and core[1] == "0", "a core file has what the payload has in memory"
