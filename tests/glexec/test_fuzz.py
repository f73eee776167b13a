"""Readers of others' bytes, with bytes that nobody meant: the mapper in its bed, the rest driven by coverage."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import pki
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from glexecbed import CHECKOUT, PEOPLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pilotbed.glexec import wrapenv

#: In the bed, as root: says for every proxy (a line of base64) what the mapper makes of it.
MAPPER = """
import base64, pwd, sys
sys.path.insert(0, "/usr/lib/pilotbed")
from pilotbed.glexec import mapper, policy
from pilotbed.mapping import MAPPER_ACCOUNT
conf, account = policy.parse_conf(open(policy.CONF_PATH).read()), pwd.getpwnam(MAPPER_ACCOUNT)
for line in sys.stdin:
    try:
        found = mapper.identify(base64.b64decode(line), conf, account)
        print("mapped", found.uid, found.gid, found.dn, found.fqan, flush=True)
    except policy.Refusal as refusal:
        print(refusal.code, ascii(refusal.reason), flush=True)
"""
BLOCK = re.compile(rb"(?<=-----\n)[A-Za-z0-9+/=\n]+(?=-----END)")


@pytest.fixture
def verdict(bed):
    """Tell what the mapper says to a proxy."""
    process = bed.start("python3", "-I", "-c", MAPPER, user="root")

    def ask(pem):
        process.stdin.write(base64.b64encode(pem).decode() + "\n")
        process.stdin.flush()
        return process.stdout.readline()

    yield ask
    assert bed.finish(process).code == 0


def changed(content, place, flip):
    there = bytearray(content)
    there[place % len(there)] ^= flip
    return bytes(there)


def test_proxy_with_any_byte_changed_is_refused_or_the_same(bed, verdict):
    """In its PEM text, or in the DER of one of its blocks: proxy, key, user's certificate."""
    genuine = bed.proxy()
    blocks = list(BLOCK.finditer(genuine))
    same = verdict(genuine)
    assert same.startswith("mapped") and len(blocks) == 3

    @settings(max_examples=400, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from([None, *blocks]), st.integers(0, 10**6), st.integers(1, 255))
    def every(block, place, flip):
        if block is None:
            pem = changed(genuine, place, flip)
        else:
            text = base64.encodebytes(changed(base64.b64decode(block[0]), place, flip))
            pem = genuine[: block.start()] + text + genuine[block.end() :]
        said = verdict(pem)
        assert said == same or said.split()[0] in {"201", "203"}, said  # 202: it crashed

    every()


RUNS = ("-runs=200000", "-max_total_time=60", "-timeout=10", "-rss_limit_mb=1024", "-max_len=8192", "-seed=4")


def seeds(reader: str, directory: Path) -> list[bytes]:
    """Return real input; for proxies, make the CA that it is judged by."""
    if reader == "configuration":
        template = (CHECKOUT / "roles/worker/templates/etc/glexec.conf.j2").read_text()
        minimal = "user_white_list = .pilot\npool_accounts = .gl\n"
        plain = "".join(line for line in template.splitlines(keepends=True) if "{" not in line)
        return [text.encode() for text in (minimal, plain + minimal, minimal + "tracking_gids = 65000-65049\n")]
    if reader == "environment":
        return [wrapenv.wrap({b"A": b"1", b"HOME": b"/x"}).encode(), base64.b64encode(b"A=1\0")]
    ca = pki.Authority(directory / "ca")
    voms = pki.VomsServer(directory / "vomsdir", ca.issue("/DC=test/CN=voms.grid.test", host="voms.grid.test"))
    voms.publish()
    alice = ca.issue(f"{PEOPLE}Alice")
    attributes = voms.attribute_certificate(alice, "/gridlab/Role=NULL/Capability=NULL")
    user = alice.chain.leaf.public_bytes(Encoding.DER)
    (directory / "alice.der").write_bytes(user)
    carrying = pki.with_attributes(alice, attributes)
    proxies = [made.chain.leaf.public_bytes(Encoding.DER) for made in (carrying, pki.proxy(alice))]
    return [*proxies, user, carrying.pem()]


@pytest.mark.long
@pytest.mark.parametrize("reader", ["configuration", "environment", "proxy"])
def test_reader_driven_by_coverage(reader, tmp_path):
    pytest.importorskip("atheris", reason="no wheel of atheris for this Python: see requirements.txt")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, content in enumerate(seeds(reader, tmp_path)):
        (corpus / str(number)).write_bytes(content)
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), reader, tmp_path, *RUNS, corpus]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
        capture_output=True, text=True, errors="replace", timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.search(r"Done \d{4,} runs", done.stderr), done.stderr[-2000:]
    assert len(list(corpus.iterdir())) > 3, "nothing new was reached: is the code instrumented?"
