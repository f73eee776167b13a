"""What is kept of logs that pilots send while they run, and what of it nobody gets to see."""

from __future__ import annotations

import gzip
import os
import random
import time
from http import HTTPStatus
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pilotbed.factory.parts import UNPACKED, Part, Refusal, Store, sent, without_secrets

SENDER = "/DC=test/CN=pilot"


def part(number: int = 0, **more: str) -> Part:
    named = {"entry": "alpha", "job": "3.0", "pilot": "glidein_7_8", "log": "StartLog"} | more
    return Part(number=number, **named)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, 1 << 20, 1 << 16)


def logs(tmp_path: Path) -> dict[str, str]:
    (only,) = sent(tmp_path)
    return only.logs(1 << 20)


@pytest.mark.parametrize("path", [
    "/", "", "/alpha/3.0/glidein_7_8/StartLog", "/alpha/3.0/glidein_7_8/../0", "/alpha/3.0/glidein_7_8/.x/0",
    "/../3.0/glidein_7_8/x/0", "/alpha/3/glidein_7_8/x/0", "/alpha/3.0/pilot/x/0", "/alpha/3.0/glidein_7_8/x/12345",
    "/alpha/3.0/glidein_7_8/x/-1", "/alpha/3.0/glidein_7_8/x/1\n", "/alpha//glidein_7_8/x/1",
    "/alpha/3.0/glidein_7_8/x%2f/1", "//alpha/3.0/glidein_7_8/x/1", "/alpha/3.0/glidein_7_8/x/\u0661",
    "/al pha/3.0/glidein_7_8/x/1",
])  # fmt: skip
def test_a_path_names_a_part_or_nothing(path: str) -> None:
    with pytest.raises(Refusal):
        Part.of(path)
    assert Part.of("/alpha/3.0/glidein_7_8/StarterLog.slot1_1/12") == part(12, log="StarterLog.slot1_1")


def test_parts_are_put_together_and_a_gap_is_shown(store: Store, tmp_path: Path) -> None:
    for number in (0, 1, 3):
        store.take(part(number), SENDER, gzip.compress(f"line {number}\n".encode()))
    store.take(part(log="MasterLog"), SENDER, gzip.compress(b"master\n"))
    (only,) = sent(tmp_path)
    assert (only.entry, only.job, only.pilot, only.sender) == ("alpha", "3.0", "glidein_7_8", SENDER)
    assert only.logs(1 << 20) == {
        "StartLog": "line 0\nline 1\n(a part is missing)\nline 3\n", "MasterLog": "master\n"
    }  # fmt: skip


def test_what_was_said_is_not_rewritten(store: Store, tmp_path: Path) -> None:
    store.take(part(), SENDER, gzip.compress(b"first\n"))
    store.take(part(), SENDER, gzip.compress(b"second\n"))
    with pytest.raises(Refusal, match="another one's pilot") as refused:
        store.take(part(1), "/DC=test/CN=friend", gzip.compress(b"third\n"))
    assert refused.value.status == HTTPStatus.FORBIDDEN
    assert logs(tmp_path) == {"StartLog": "first\n"}


BOMB = gzip.compress(bytes(UNPACKED + 1))


@pytest.mark.parametrize(("body", "why"), [
    (b"plain", "gzip"), (b"", "gzip"), (gzip.compress(b"x" * 1000)[:-9], "whole"), (BOMB, "whole"),
    (gzip.compress(b"x") * 2, "whole"), (gzip.compress(b"x") + b"more", "whole"), (os.urandom(300 << 10), "at most"),
], ids=["text", "nothing", "cut", "bomb", "two", "more", "long"])  # fmt: skip
# Names of their own: gzip has the time in it, and two processes that collect tests have to find the same ones.
def test_what_is_no_part_is_refused_and_leaves_nothing(store: Store, tmp_path: Path, body: bytes, why: str) -> None:
    with pytest.raises(Refusal, match=why):
        store.take(part(), SENDER, body)
    assert not list(tmp_path.iterdir())
    store.take(part(), SENDER, gzip.compress(bytes(UNPACKED)))


def noise(seed: int, size: int = 20000) -> bytes:
    return gzip.compress(random.Random(seed).randbytes(size))


def test_a_pilot_may_fill_no_more_than_its_share(store: Store) -> None:
    for number in range(3):
        store.take(part(number), SENDER, noise(number))
    with pytest.raises(Refusal, match="no more than 65536 octets of one pilot"):
        store.take(part(3), SENDER, noise(3))
    store.take(part(pilot="glidein_9_9"), SENDER, noise(3))


def test_of_all_pilots_the_oldest_go_first_also_after_a_restart(tmp_path: Path) -> None:
    old = Store(tmp_path, 100_000, 1 << 16)
    for at in range(4):
        old.take(part(pilot=f"glidein_1_{at}"), SENDER, noise(at))
        os.utime(tmp_path / "alpha/3.0" / f"glidein_1_{at}/StartLog.0000.gz", (at, at))
        os.utime(tmp_path / "alpha/3.0" / f"glidein_1_{at}/sender", (at, at))
    fresh = Store(tmp_path, 100_000, 1 << 16)
    for at in (7, 8):
        fresh.take(part(pilot=f"glidein_1_{at}"), SENDER, noise(at))
    assert [one.pilot for one in sent(tmp_path)] == [f"glidein_1_{at}" for at in (2, 3, 7, 8)]


def test_what_an_operator_has_removed_or_dropped_stops_nothing(store: Store, tmp_path: Path) -> None:
    store.take(part(), SENDER, gzip.compress(b"one\n"))
    kept = tmp_path / "alpha/3.0/glidein_7_8"
    (kept / "StartLog.0001.gz").write_bytes(b"damaged")
    (kept / "notes").write_text("mine")
    (tmp_path / "alpha/3.0/glidein_1_1").mkdir()
    (tmp_path / "README").write_text("mine")
    assert logs(tmp_path)["StartLog"].startswith("one\n(damaged: ")
    Store(tmp_path, 1 << 20, 1 << 16)
    for path in kept.iterdir():
        path.unlink()
    kept.rmdir()
    store.take(part(1), SENDER, gzip.compress(b"two\n"))
    assert logs(tmp_path) == {"StartLog": "(a part is missing)\ntwo\n"}


# -- secrets --------------------------------------------------------------------------------------------------------


def pem(kind: str) -> bytes:
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
    form = PrivateFormat.TraditionalOpenSSL if kind == "ec old" else PrivateFormat.PKCS8
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


@pytest.mark.parametrize("kind", ["rsa", "ec", "ec old"])
@pytest.mark.parametrize("cut", [0, 100, 150])
def test_a_private_key_is_left_out_also_where_a_part_begins_in_it(kind: str, cut: int) -> None:
    key = pem(kind)
    shown = without_secrets(b"before\n" * (not cut) + key[cut:] + b"after\n")
    left = [line for line in key.splitlines() if line in shown.splitlines()]
    # The last line may be as short as a word.
    assert all(line.startswith(b"-----") or len(line) < 24 for line in left)
    assert shown.endswith(b"after\n")
    in_one = without_secrets(b'{"key": "%s"}' % key.replace(b"\n", b"\\n"))
    assert not any(line in in_one for line in key.splitlines() if len(line) == 64)


@pytest.mark.parametrize(("said", "shown"), [
    (b"token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl end", b"token [token left out] end"),
    (b'claim <10.1.2.3:9618?addrs=x>#1796039375#12#[Integrity="YES";]0123abcd released',
     b"claim <10.1.2.3:9618?addrs=x>#1796039375#12#[left out] released"),
    (b"from https://user:s3cret@squid.test/x", b"from https://[left out]@squid.test/x"),
])  # fmt: skip
def test_tokens_claims_and_passwords_are_left_out(said: bytes, shown: bytes) -> None:
    assert without_secrets(said) == shown


@pytest.mark.parametrize("said", [
    b"11/30/26 11:58:32 (pid:1183) Launching gridmanager with -o factory -u factory@grid.test\n",
    b"glidein: refused: a.sh from http://x/y: digest mismatch (signed " + b"0a" * 32 + b", fetched " + b"1B" * 32,
    b"claim <10.1.2.3:9618>#1796039375#12#... released\n", b"http://factory.grid.test/factory/stage/entry_alpha/x.1\n",
    b"a" * 40 + b"\n", b"-----BEGIN CERTIFICATE-----\n", b"\xff\x00\xfe binary\n", b"started#123#4\n",
])  # fmt: skip
def test_what_is_no_secret_stays(said: bytes) -> None:
    assert without_secrets(said) == said


@pytest.mark.parametrize("begun", [
    b"eyJ", b"eyJ.", b"eyJa.", b"#1#1#", b">#1#1#", b"://a:", b"://", b"A" * 59 + b"-", b"A+/", b"0", b"-----BEGIN ",
    b"\n",    b"AAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n",
])  # fmt: skip
def test_beginnings_of_secrets_take_no_time(begun: bytes) -> None:
    def seconds(size: int) -> float:
        started = time.process_time()
        without_secrets(begun * (size // len(begun)))
        return time.process_time() - started

    small = min(seconds(UNPACKED // 20) for _ in range(3))
    assert seconds(UNPACKED) < max(150 * small, 1), "what looks at all that follows needs 400 times as long"


def test_what_is_kept_has_no_secrets(store: Store, tmp_path: Path) -> None:
    key = pem("rsa")
    store.take(part(), SENDER, gzip.compress(key))
    lines = [line for line in key.splitlines() if len(line) == 64]
    kept = [gzip.decompress(path.read_bytes()) for path in tmp_path.rglob("*.gz")]
    assert (len(kept), len(lines) > 10) == (1, True)
    assert not any(line in kept[0] for line in lines)
