"""The service: a Flask application over LCMAPS, for gunicorn behind nginx, which has verified who asks.

A worker process has one thread and its own LCMAPS. nginx alone may reach the socket: whoever can, can say in the
header ASKER that he is anybody.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import pwd
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from pilotbed import dn
from pilotbed.lcmaps import Lcmaps
from pilotbed.service import event, set_up_logging
from pilotbed.settings import load

from . import json_face, xacml
from .model import LARGEST, Account, Answer, BadRequest, Subject, decide, may_ask

CONFIG = "/etc/pilotbed/mapping.toml"
ASKER = "X-Pilotbed-Asker"

_log = logging.getLogger("pilotbed.mapping")


@dataclass(frozen=True)
class Settings:
    """The configuration file."""

    hosts: tuple[str, ...]  # DNs (slash form) that may ask
    issuer: str  # by which the service names itself in SAML (a URI)
    lcmaps_database: str
    lcmaps_policy: str
    gridmapdir: str  # where the policy leases accounts
    lcmaps_debug_level: int = 0

    def __post_init__(self) -> None:
        for host in self.hosts:
            dn.parse(host)  # NotADn is a ValueError: SettingsError, with the file's name


def create(config: str = CONFIG) -> Flask:
    """Return the application; gunicorn calls this in each of its workers.

    Raises:
        SettingsError, LcmapsError: it cannot start.
    """
    set_up_logging()
    settings = load(Path(config), Settings)
    lcmaps = Lcmaps(
        settings.lcmaps_database, settings.lcmaps_policy, settings.lcmaps_debug_level, environment=dict(os.environ),
        gridmapdir=settings.gridmapdir,
    )  # fmt: skip

    def look_up(subject: Subject) -> Account | None:
        found = lcmaps.run_with_fqans(subject.dn, subject.fqans)
        if found is None:
            return None
        return Account(pwd.getpwuid(found.uid).pw_name, found.uid, found.gid, found.groups)

    return application(settings, look_up)


def application(settings: Settings, look_up: Callable[[Subject], Account | None]) -> Flask:
    """Return the application over ``look_up``, which names the account for a user."""
    made = Flask("pilotbed-mapping", static_folder=None)
    made.config["MAX_CONTENT_LENGTH"] = LARGEST

    def audit(face: str, subject: Subject | None, **result: object) -> None:
        who = {"dn": subject.dn, "fqans": ",".join(subject.fqans)} if subject else {}
        _log.info(event("mapping", asker=request.headers.get(ASKER, ""), face=face, **who, **result))

    def answer(face: str, subject: Subject) -> Answer:
        given = decide(subject, look_up(subject))
        account = given.account
        told = {"account": account.name, "uid": account.uid, "gid": account.gid} if account else {"why": given.reason}
        audit(face, subject, **told)
        return given

    def stranger(face: str) -> str:
        """Return why whoever asks is answered nothing, if so."""
        asker = request.headers.get(ASKER, "")
        if may_ask(asker, settings.hosts):
            return ""
        audit(face, None, why="may not ask")
        return f"{asker or 'whoever has no certificate'} may not ask here: it is not among the hosts in {CONFIG}"

    def by_json() -> Response:
        if reason := stranger("json"):
            return Response(json_face.error(reason), 403, content_type=json_face.TYPE)
        try:
            subject = json_face.subject(request.get_data())
        except BadRequest as error:
            audit("json", None, why=error)
            return Response(json_face.error(str(error)), 400, content_type=json_face.TYPE)
        return Response(json_face.response(answer("json", subject)), content_type=json_face.TYPE)

    def by_xacml() -> Response:
        if reason := stranger("xacml"):
            return Response(xacml.fault(reason), 403, content_type=xacml.TYPE)
        try:
            query = xacml.query(request.get_data())
        except BadRequest as error:
            audit("xacml", None, why=error)
            return Response(xacml.fault(str(error)), 500, content_type=xacml.TYPE)  # SOAP 1.1, 6.2: a fault is a 500
        if query.undecided:
            audit("xacml", None, why=query.undecided)
        given = answer("xacml", query.subject) if query.subject else None
        now = dt.datetime.now(dt.UTC)
        told = xacml.response(query, given, settings.issuer, now, lambda: f"_{secrets.token_hex(16)}")
        return Response(told, content_type=xacml.TYPE)

    def failed(error: Exception) -> Response:
        """Answer nothing that could be taken for a decision, and leave a line."""
        code = error.code if isinstance(error, HTTPException) and error.code else 500
        reason = error.description if isinstance(error, HTTPException) else "internal error: see the service's log"
        audit(request.path.strip("/")[:16], None, why=f"{type(error).__name__}: {error}")
        return Response(json_face.error(str(reason)), code, content_type=json_face.TYPE)

    made.add_url_rule("/map", view_func=by_json, methods=["POST"])
    made.add_url_rule("/xacml", view_func=by_xacml, methods=["POST"])
    made.register_error_handler(Exception, failed)
    return made
