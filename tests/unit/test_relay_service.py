"""What a fault ends in the relay and its border: nothing but what it is about."""

import asyncio
import contextlib
import logging
from types import SimpleNamespace

import pytest
from pilotbed.relay.authorization import Authorization
from pilotbed.relay.border import Border, Config
from pilotbed.relay.service import Service
from pilotbed.x509 import CertificateError, TrustError


class Bare(Service):
    def status(self):
        return {}

    def metrics(self):
        return []

    async def start(self):
        pass

    async def stop(self):
        pass


def test_a_fault_does_not_end_what_is_done_for_ever(tmp_path, caplog):
    service = Bare("relay", tmp_path / "socket", ())
    turns = []

    async def work():
        turns.append(len(turns))
        if len(turns) < 3:
            raise ZeroDivisionError("a defect")
        raise asyncio.CancelledError

    async def run():
        with contextlib.suppress(asyncio.CancelledError):
            await service.repeat(0, work)

    asyncio.run(run())
    assert turns == [0, 1, 2]
    assert caplog.text.count("event=fault") == caplog.text.count("Traceback") == 2


@pytest.mark.parametrize(
    ("error", "revoked"),
    [
        (ZeroDivisionError("a defect"), ["2"]),
        (CertificateError("revoked"), ["1", "2"]),
        (TrustError("no list"), []),  # nothing can be said of any certificate
    ],
)
def test_one_certificate_does_not_keep_the_others_from_being_looked_at(tmp_path, caplog, error, revoked):
    service = Bare("relay", tmp_path / "socket", ())

    def verify(chain, purpose):
        raise error if chain.dn == "1" else CertificateError("revoked")

    watched = [SimpleNamespace(chain=SimpleNamespace(dn=dn), purpose=None) for dn in ("1", "2")]
    authorization = SimpleNamespace(
        _watched=dict(enumerate(watched)), _trust=SimpleNamespace(verify=verify), _log=logging.getLogger("x")
    )
    found = []
    asyncio.run(Authorization.recheck(authorization, lambda one, _: found.append(one.chain.dn), service.apart))
    assert found == revoked
    assert ("event=fault" in caplog.text) is isinstance(error, ZeroDivisionError)


def test_a_name_that_is_none_does_not_keep_the_border_from_the_others(caplog):
    border = Border(Config(("x" * 70 + ".test:80", "localhost:80"), (), None))
    asyncio.run(border._resolve())
    assert "127.0.0.1" in border._names["localhost"]
    assert "event=unresolved" in caplog.text
