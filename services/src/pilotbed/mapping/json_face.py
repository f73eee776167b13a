"""The model in JSON: ``{"dn", "fqans"}`` in, ``{"decision", "account" or "reason"}`` out."""

import json
from typing import Any

from .model import LARGEST, Account, Answer, BadRequest, Subject

TYPE = "application/json"


def _object(message: bytes, *keys: str) -> dict[str, Any]:
    """Return the object that ``message`` is, with all of ``keys`` and no others."""
    if len(message) > LARGEST:
        raise BadRequest(f"the message is longer than {LARGEST} bytes")
    try:
        found = json.loads(message, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not JSON: {error}") from error
    if not isinstance(found, dict) or set(found) - set(keys):
        raise BadRequest(f"the message must be an object with no other keys than {', '.join(keys)}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers of a key that stands there twice could take different ones."""
    if len(dict(pairs)) < len(pairs):
        raise BadRequest("a key stands twice in the message")
    return dict(pairs)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise BadRequest(f"{str(value)[:80]!r} is not a whole number")
    return value


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{key} must be a string")
    return value


def _list(value: object, key: str) -> list[object]:
    if not isinstance(value, list):
        raise BadRequest(f"{key} must be a list")
    return value


def subject(message: bytes) -> Subject:
    """Return who is asked about. Raises BadRequest."""
    found = _object(message, "dn", "fqans")
    fqans = tuple(_text(fqan, "an FQAN") for fqan in _list(found.get("fqans", []), "fqans"))
    return Subject(_text(found.get("dn"), "dn"), fqans)


def request(asked: Subject) -> bytes:
    """Return the message that asks about a user."""
    return json.dumps({"dn": asked.dn, "fqans": asked.fqans}).encode()


def answer(message: bytes) -> Answer:
    """Return the answer that a service has sent. Raises BadRequest."""
    found = _object(message, "decision", "account", "reason")
    decision = found.get("decision")
    if decision == "deny":
        return Answer(None, _text(found.get("reason"), "reason"))
    account = found.get("account")
    if decision != "permit" or not isinstance(account, dict) or set(account) != {"name", "uid", "gid", "groups"}:
        raise BadRequest("the decision is neither deny, nor permit with an account of name, uid, gid and groups")
    groups = tuple(_whole(gid) for gid in _list(account["groups"], "groups"))
    return Answer(Account(_text(account["name"], "name"), _whole(account["uid"]), _whole(account["gid"]), groups))


def response(given: Answer) -> bytes:
    """Return the message that answers."""
    if given.account is None:
        return json.dumps({"decision": "deny", "reason": given.reason}).encode()
    account = given.account
    told = {"name": account.name, "uid": account.uid, "gid": account.gid, "groups": account.groups}
    return json.dumps({"decision": "permit", "account": told}).encode()


def error(reason: str) -> bytes:
    """Return the message that says why there is no answer."""
    return json.dumps({"error": reason}).encode()
