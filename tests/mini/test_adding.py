"""docs/adding.md holds: with the files of its lists alone, a batch system and a service are added to a copy.

The copy then deploys inventory/small, two nodes with as much on one as there can be: the site's jobs run under the new
batch system, and the service answers. What is added is a dummy, but a real one: A-REX's own way to run jobs on its
host, and a page over HTTP.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from pilotbed_suite import CHECKOUT, local

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="nodes are made by root")

BATCH = {
    "inventory/common/group_vars/batch_fork.yml": """\
batch_system_flavour: batch_fork
batch_system_name: fork
batch_system_queue: fork
batch_system_for:
  ce_arc: {lrms: fork, options: {}}
batch_fork_sockets: []
batch_fork_logs: {units: [arc-arex]}
""",
    "roles/batch_fork/meta/main.yml": """\
galaxy_info:
  author: somebody
  description: Jobs on the computing element itself
  license: Apache-2.0
  min_ansible_version: "2.19"
dependencies:
  - role: pool_accounts
""",
    "roles/batch_fork/meta/argument_specs.yml": """\
argument_specs:
  main:
    short_description: Run jobs on the computing element itself.
    options: {}
""",
    "roles/batch_fork/defaults/main.yml": "{}\n",
    "roles/batch_fork/tasks/main.yml": """\
- name: Prove that a pilot's account can run something
  ansible.builtin.command: runuser --user {{ grid_pools[0].prefix }}001 -- /bin/true
  changed_when: false
  tags: [batch_fork_run]
""",
    "services/src/pilotbed/batch/fork.py": '''\
"""A-REX's own jobs: no batch system says anything of them."""


def job(title):
    return ""


def recorded(jobs):
    return {}


def parse(text):
    return {}
''',
}

SERVICE = {
    "inventory/common/group_vars/hello.yml": """\
hello_sockets:
  - {program: nginx, port: 8088, proto: tcp, from: any, protected: "plain HTTP: it says hello to everybody"}
hello_logs: {units: [pilotbed-hello]}
""",
    "roles/hello/meta/main.yml": """\
galaxy_info:
  author: somebody
  description: Says hello
  license: Apache-2.0
  min_ansible_version: "2.19"
dependencies:
  - role: pilotbed
""",
    "roles/hello/meta/argument_specs.yml": """\
argument_specs:
  main:
    short_description: Say hello over HTTP.
    options:
      hello_port: {description: Where it listens., type: int}
""",
    "roles/hello/defaults/main.yml": "hello_port: 8088\n",
    "roles/hello/tasks/main.yml": """\
- name: Configure and run it
  config_tree:
    units: [pilotbed-hello.service]
  tags: [hello_configure, hello_run]

- name: Prove that it answers
  ansible.builtin.command: curl --silent http://127.0.0.1:{{ hello_port }}/
  register: __hello_proof
  until: __hello_proof.stdout == "hello"
  retries: 20
  delay: 1
  changed_when: false
  tags: [hello_run]
""",
    "roles/hello/templates/etc/systemd/system/pilotbed-hello.service.j2": """\
[Service]
ExecStart=/usr/bin/pilotbed-hello {{ hello_port }}
DynamicUser=yes

[Install]
WantedBy=multi-user.target
""",
    "services/src/pilotbed/hello/__init__.py": '''\
"""Says hello."""

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")


def main():
    HTTPServer(("", int(sys.argv[1])), Page).serve_forever()
''',
    "roles/pilotbed/files/usr/bin/pilotbed-hello": """\
#!/usr/bin/python3 -I
import sys
sys.path.insert(0, "/usr/lib/pilotbed")
from pilotbed.hello import main
sys.exit(main())
""",
}


def listed(heading, name):
    """Return the files of a list of docs/adding.md: what stands in backquotes at the beginning of each item."""
    section = (CHECKOUT / "docs/adding.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    items = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    heads = [re.split(r": |, if |\. | \(", " ".join(item.split()))[0] for item in items]
    files = {path for head in heads for path in re.findall(r"`([^`]+)`", head)}
    # "or an inventory of its own"
    files = {path.replace("/lab/", "/small/") for path in files if "/" in path and "NAME/__" not in path}
    if "services/src/pilotbed/NAME/__init__.py" in section:
        files.add("services/src/pilotbed/NAME/__init__.py")
    return {path.replace("NAME", name) for path in files}


def edit(path, pattern, replacement):
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    assert count == 1, f"{path} has changed: this test must follow"
    path.write_text(text)


def contents(top):
    """Return the files of a checkout, by path, as git knows them or as they lie there."""
    found = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return {path for path in found.split("\0") if path}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The copy, and the files in which it differs from this checkout."""
    top = tmp_path_factory.mktemp("adding") / "checkout"
    for path in contents(CHECKOUT):
        if (CHECKOUT / path).is_symlink() or (CHECKOUT / path).is_file():
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / path, top / path, follow_symlinks=False)
    for path, content in {**BATCH, **SERVICE}.items():
        assert not (top / path).exists()
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(content)
    (top / "roles/pilotbed/files/usr/bin/pilotbed-hello").chmod(0o755)
    edit(top / "inventory/common/groups.yml", r"^( +)batch_slurm:.*$", r"\g<0>\n\1batch_fork: # A-REX's own.")
    edit(top / "inventory/common/groups.yml", r"^( +)relay:.*$", r"\g<0>\n\1hello: # says hello.")
    with (top / "playbooks/pool.yml").open("a") as plays:
        plays.write("\n- name: Hello\n  hosts: all:&hello\n  roles: [hello]\n")
    edit(top / "inventory/small/hosts.yml", r"batch_htcondor:", "batch_fork:")
    edit(top / "inventory/small/hosts.yml", r"^( +)relay: (\{hosts: .*\})$", r"\g<0>\n\1hello: \2")
    return top


def test_the_lists_name_every_file_that_was_made_or_changed(copy):
    changed = {
        str(path.relative_to(copy)) for path in copy.rglob("*")
        if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts and "var" not in path.parts
        and ".venv" not in path.parts
        and (not (CHECKOUT / path.relative_to(copy)).exists()
             or path.read_bytes() != (CHECKOUT / path.relative_to(copy)).read_bytes())
    }  # fmt: skip
    assert changed == listed("A batch system", "fork") | listed("A service", "hello")


@pytest.fixture(scope="module")
def deployed(copy):
    """The copy's own lab, with the copy's own code; what runs a command of the copy's."""
    environment = {
        **os.environ, "LAB": "adding", "ANSIBLE_INVENTORY": "inventory/common,inventory/small",
        "PYTHONPATH": ":".join(str(copy / part / "src") for part in ("services", "suite", "lab")),
    }  # fmt: skip

    def run(*words):
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        run("pilotbed_lab", "up")
        yield run
    finally:
        run("pilotbed_lab", "destroy")


def on(copy, node, command):
    """Return what a command prints on a node of the copy's lab."""
    entered = local.enter(node, "/bin/sh", "-c", command, lab=copy / "var/labs/adding")
    return subprocess.run(entered, capture_output=True, text=True, check=True).stdout


def test_jobs_run_under_the_batch_system_that_was_added(copy, deployed):
    assert "the walk is done" in deployed("pilotbed_suite.walk")
    assert "lrms = fork" in on(copy, "site", "cat /etc/arc.conf")
    assert "batch_system = fork" in on(copy, "site", "cat /etc/glexec.conf")
    assert on(copy, "site", "systemctl is-active condor-site || true").strip() == "inactive"


def test_the_service_that_was_added_answers(copy, deployed):
    assert on(copy, "site", "curl --silent --max-time 5 http://services.grid.test:8088/") == "hello"
