"""A mapping service beside glexec in the same bed: nginx and gunicorn as the role `mapping_service` installs them.

     glexec ── TLS 1.3, certificate of the account glexec ──▶ nginx ── unix socket ──▶ gunicorn ── LCMAPS
     curl, as any host ───────────────────────────────────▶        (asker's DN)        (account glexec)

There is no systemd in the bed: what its units say about socket, account and command is done by STARTER.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glexecbed import TRUST, Bed, until
from pilotbed.x509 import Credential

HOST, PORT = "mapping.grid.test", 8443
#: Where `Service.start_bare` listens.
BARE_PORT = 8444
HOSTS = "/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN="
WORKER = "/DC=test/DC=grid/O=Gridlab/OU=Services/CN=glexec.wn.grid.test"
LOG = "/run/mapping.log"

STARTER = r"""
import grp, os, pwd, re, shlex, socket, sys
text = "".join(open(f"/etc/systemd/system/{sys.argv[1]}.{kind}").read() for kind in ("socket", "service"))
said = dict(re.findall(r"^(\w+)=(.*)$", text, re.M))
path, account = said["ListenStream"], pwd.getpwnam(said["User"])
if os.path.exists(path): os.unlink(path)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(128)
os.chown(path, pwd.getpwnam(said["SocketUser"]).pw_uid, grp.getgrnam(said["SocketGroup"]).gr_gid)
os.chmod(path, int(said["SocketMode"], 8))
runtime = "/run/" + said["RuntimeDirectory"]
os.makedirs(runtime, exist_ok=True)
os.chown(runtime, account.pw_uid, account.pw_gid)
if listener.fileno() != 3: os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.umask(int(said["UMask"], 8))
os.chdir(said["WorkingDirectory"])
os.setgroups([]); os.setgid(account.pw_gid); os.setuid(account.pw_uid)
command = shlex.split(said["ExecStart"])
os.execve(command[0], command, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "PATH": "/usr/bin:/bin"})
"""

#: What any Flask application costs at the least.
BARE = """import flask
def create():
    app = flask.Flask("bare", static_folder=None)
    app.add_url_rule("/map", view_func=lambda: "bare", methods=["POST"])
    return app
"""

QUERY = """<e:Envelope xmlns:e="http://schemas.xmlsoap.org/soap/envelope/"><e:Body>
<q:XACMLAuthzDecisionQuery xmlns:q="urn:oasis:xacml:2.0:saml:protocol:schema:os" ID="q" Version="2.0"
 IssueInstant="2026-11-21T09:00:00Z"><c:Request xmlns:c="urn:oasis:names:tc:xacml:2.0:context:schema:os">
<c:Subject>%s</c:Subject><c:Resource>%s</c:Resource><c:Action>%s</c:Action><c:Environment/>
</c:Request></q:XACMLAuthzDecisionQuery></e:Body></e:Envelope>"""


def query(dn: str, *fqans: str) -> str:
    """Return a query of the authorization interoperability profile: may this user run a job on a worker?"""
    def attribute(name: str, *values: str) -> str:
        texts = "".join(f"<c:AttributeValue>{value}</c:AttributeValue>" for value in values)
        kind = "http://www.w3.org/2001/XMLSchema#string"
        return f'<c:Attribute AttributeId="{name}" DataType="{kind}">{texts}</c:Attribute>'

    grid, known = "http://authz-interop.org/xacml", "urn:oasis:names:tc:xacml:1.0"
    return QUERY % (
        attribute(f"{grid}/subject/subject-x509-id", dn) + attribute(f"{grid}/subject/voms-fqan", *fqans),
        attribute(f"{known}:resource:resource-id", f"{grid}/resource/resource-type/wn"),
        attribute(f"{known}:action:action-id", f"{grid}/action/action-type/execute-now"),
    )


@dataclass(frozen=True)
class Reply:
    """What the service has said: status (0: nothing), body, and curl's own words."""

    status: int
    body: str
    words: str

    @property
    def json(self) -> dict:
        return json.loads(self.body)


class Service:
    """The service; `close` ends it and leaves the bed as it was."""

    def __init__(self, bed: Bed):
        self.bed = bed
        self._started: list[subprocess.Popen[bytes]] = []
        if not bed.path("/etc/pilotbed/mapping.toml").exists():
            self._install()
        bed.root(f": >{LOG}; /usr/libexec/pilotbed/nginx-trust; nginx")
        self.start()

    def _install(self) -> None:
        bed = self.bed
        bed.root(f"ip link set lo up; echo 127.0.0.1 {HOST} >>/etc/hosts")
        bed.root("mkdir -p /etc/grid-security/glexec /srv/hosts")
        # Whoever installs units has systemd read them; here is none.
        bed.write("/usr/local/sbin/systemctl", '#!/bin/sh\n[ "$*" = daemon-reload ]\n', "root", 0o755)
        bed.deploy(
            "mapping_service", "--skip-tags", "mapping_service_run", "--extra-vars", '{"__mapping_service_units": []}',
            mapping_service_host=HOST, mapping_service_hosts=[WORKER, f"{HOSTS}{HOST}"],
        )  # fmt: skip
        bed.root("rm /usr/local/sbin/systemctl")
        self.hold("/etc/grid-security/host%s.pem", bed.ca.issue(HOSTS + HOST, host=HOST), "root")
        bed.worker = bed.ca.issue(WORKER)
        self.hold("/etc/grid-security/glexec/%s.pem", bed.worker, "glexec")
        self.hold("/srv/hosts/worker-%s.pem", bed.worker, "root")

    def hold(self, path: str, credential: Credential, owner: str) -> None:
        """Write a certificate and its key; %s in the path stands for cert and key."""
        whole = credential.pem().decode()
        key = whole.index("-----BEGIN PRIVATE") if "BEGIN PRIVATE" in whole else whole.index("-----BEGIN RSA PRIVATE")
        end = whole.index("-----END", key)
        end = whole.index("\n", end) + 1
        self.bed.write(path % "cert", whole[:key] + whole[end:], owner, 0o644)
        self.bed.write(path % "key", whole[key:end], owner, 0o400)

    def start(self, who: str = "worker") -> None:
        """Start gunicorn, and wait for its answer to ``who``."""
        self._start("pilotbed-mapping", lambda: self.map("/DC=invalid/CN=nobody", who=who))

    def _start(self, units: str, ask: Callable[[], Reply]) -> None:
        command = self.bed.command("python3", "-I", "-c", STARTER, units, user="root")
        process = subprocess.Popen(["sh", "-c", 'exec "$@" >>"$0" 2>&1', str(self.bed.path(LOG)), *command])
        self._started.append(process)

        def answers() -> bool:
            assert process.poll() is None, f"gunicorn has ended: {self.lines()[-30:]}"
            return ask().status == 200

        until(f"{units} answers", answers)

    def start_bare(self) -> None:
        """Start the application `BARE` beside the service: units and nginx's site are the service's, but for names."""
        bed = self.bed
        bed.write("/usr/lib/pilotbed/bare.py", BARE, "root", 0o644)
        names = {"pilotbed-mapping.sock": "bare.sock", "pilotbed.mapping.app:": "bare:", str(PORT): str(BARE_PORT)}
        for path in ("systemd/system/%s.socket", "systemd/system/%s.service", "nginx/sites-enabled/%s"):
            text = bed.path(f"/etc/{path % 'pilotbed-mapping'}").read_text()
            for name, other in names.items():
                text = text.replace(name, other)
            bed.write(f"/etc/{path % 'bare'}", text, "root", 0o644)
        self.reload()
        self._start("bare", lambda: self.curl("/map", port=BARE_PORT))

    def stop(self) -> None:
        """End gunicorn, the bare application's too."""
        self.bed.root("pkill -KILL -f '[b]in/gunicorn' || true")
        while self._started:
            self._started.pop().wait()
        until("gunicorn has ended", lambda: "gunicorn" not in str(self.bed.processes()))

    def close(self) -> None:
        """End gunicorn and nginx."""
        self.stop()
        self.bed.root("pkill -KILL -x nginx || true; rm -f /run/*.sock /run/nginx.pid /etc/nginx/sites-enabled/bare")

    def reload(self) -> None:
        """Do what pilotbed-nginx-trust.path and systemctl would after a CRL was fetched."""
        before = self.bed.root("pgrep -f 'nginx: worker' || true").split()
        self.bed.root("/usr/libexec/pilotbed/nginx-trust; nginx -s reload")
        until("nginx has new workers", lambda: not set(before) & set(self.bed.root("pgrep -f 'nginx: worker'").split()))

    def lines(self) -> list[str]:
        """Return what the service has logged."""
        return self.bed.path(LOG).read_text().splitlines()

    def curl(self, path: str, *options: str, who: str = "worker", body: str = "", port: int = PORT) -> Reply:
        """Send a request as ``who``, whose certificate is in /srv/hosts; nobody's with an empty name."""
        certificate = ["--cert", f"/srv/hosts/{who}-cert.pem", "--key", f"/srv/hosts/{who}-key.pem"] if who else []
        done = self.bed.run(
            "curl", "--silent", "--show-error", "--capath", TRUST, *certificate, "--data-binary", "@-",
            "--write-out", "\n%{http_code}", *options, f"https://{HOST}:{port}{path}", user="root", input=body,
        )  # fmt: skip
        text, _, status = done.out.rpartition("\n")
        return Reply(int(status), text, done.err)

    def load(self, clients: int, seconds: float, port: int = PORT) -> dict:
        """Have keep-alive clients ask as fast as they can; return what `mappingload` prints."""
        self.bed.write("/srv/mappingload.py", Path(__file__).with_name("mappingload.py").read_text(), "root", 0o644)
        credential = [f"/srv/hosts/worker-{part}.pem" for part in ("cert", "key")]
        url = f"https://{HOST}:{port}/map"
        done = self.bed.run(
            "python3", "/srv/mappingload.py", url, str(clients), str(seconds), *credential, TRUST, user="root"
        )
        assert done.code == 0, done
        return json.loads(done.out)

    def map(self, dn: str, *fqans: str, **options) -> Reply:
        """Ask in JSON."""
        kind = ("--header", "Content-Type: application/json")
        return self.curl("/map", *kind, body=json.dumps({"dn": dn, "fqans": fqans}), **options)
