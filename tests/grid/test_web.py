"""What a host's web server offers on port 80: the files of its services by the host's name, and nothing else."""

import pytest
from pilotbed_suite.support import ok

#: A file of each service that is there from the first deployment on.
OFFERED = {
    "certificate_authority": "/ca.r0",
    "factory": "/factory/stage/manifest.json",
    "frontend": "/frontend/stage/manifest.json",
}


def answer(grid, group, path, name=None):
    """Return the status by which a group's host answers the submit host, which asks for it by ``name``; or curl's."""
    fqdn = grid.fqdn(grid.names(group)[0])
    done = grid.node("submit").run(
        "curl --silent --path-as-is --output /dev/null --write-out %%{http_code} --header %s %s",
        f"Host: {name or fqdn}", f"http://{fqdn}{path}",
    )  # fmt: skip
    return int(done.stdout) if done.rc == 0 else f"curl {done.rc}"


@pytest.mark.parametrize(("group", "path"), OFFERED.items())
def test_files_by_the_hosts_name(grid, group, path):
    assert answer(grid, group, path) == 200


@pytest.mark.parametrize(("group", "path"), OFFERED.items())
def test_nothing_by_another_name(grid, group, path):
    empty_reply = "curl 52"
    assert answer(grid, group, path, "wrong.example.org") == empty_reply


@pytest.mark.parametrize("group", ["factory", "frontend"])
@pytest.mark.parametrize("path", ["/", "/stage/manifest.json", "/{}/", "/{}/stage/", "/{}/stage/.hidden", "/{}/../ca"])
def test_nothing_beside_them(grid, group, path):
    hidden = f"/var/lib/pilotbed/{group}/stage/.hidden"
    ok(grid.node(group), "touch %s", hidden)
    try:
        assert answer(grid, group, path.format(group)) in (403, 404)
    finally:
        ok(grid.node(group), "rm %s", hidden)
