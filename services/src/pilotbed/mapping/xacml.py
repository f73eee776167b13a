"""The model in XACML 2.0 over SAML 2.0 over SOAP 1.1, in the words of the authorization interoperability profile.

Sources: GFD.205, "An XACML Attribute and Obligation Profile for Authorization Interoperability in Grids" (names of
attributes and obligations); OASIS, "SAML 2.0 profile of XACML v2.0" (query and statement); W3C, SOAP 1.1 (no DTD and no
processing instruction, section 3; faults, section 4.4). Nothing is signed: both ends are known by TLS.
"""

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, TreeBuilder, tostring
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from .model import LARGEST, Answer, BadRequest, Subject

TYPE = "text/xml; charset=utf-8"
DEEPEST = 32  # elements inside each other; a query has 9

_SOAP = "http://schemas.xmlsoap.org/soap/envelope/"
_CONTEXT = "urn:oasis:names:tc:xacml:2.0:context:schema:os"
_POLICY = "urn:oasis:names:tc:xacml:2.0:policy:schema:os"
#: Namespace of the query to that of the statement: OASIS Standard of 2005, and the second version of the profile.
_PROFILES = {
    "urn:oasis:xacml:2.0:saml:protocol:schema:os": "urn:oasis:xacml:2.0:saml:assertion:schema:os",
    "urn:oasis:names:tc:xacml:2.0:profile:saml2.0:v2:schema:protocol":
        "urn:oasis:names:tc:xacml:2.0:profile:saml2.0:v2:schema:assertion",
}  # fmt: skip
_GRID = "http://authz-interop.org/xacml"
_DN = f"{_GRID}/subject/subject-x509-id"
_FQAN = f"{_GRID}/subject/voms-fqan"
_PRIMARY_FQAN = f"{_GRID}/subject/voms-primary-fqan"
_RESOURCE = "urn:oasis:names:tc:xacml:1.0:resource:resource-id"
_ACTION = "urn:oasis:names:tc:xacml:1.0:action:action-id"
#: What the site's policy is about: running jobs, on a computing element or on a worker.
_RESOURCES = {f"{_GRID}/resource/resource-type/{name}" for name in ("ce", "wn")}
_ACTIONS = {f"{_GRID}/action/action-type/{name}" for name in ("queue", "execute-now")}
_XSD = "http://www.w3.org/2001/XMLSchema"
_TEXTS = {f"{_XSD}#string", f"{_XSD}#anyURI"}
_STATUS = "urn:oasis:names:tc:xacml:1.0:status"


class _Undecided(Exception):
    """A proper query that the policy cannot be asked with."""

    def __init__(self, decision: str, status: str, reason: str) -> None:
        super().__init__(reason)
        self.decision, self.status, self.reason = decision, status, reason


@dataclass(frozen=True)
class Query:
    """A query: who is asked about, or why nobody can be (``undecided``)."""

    id: str
    profile: str
    context: Element | None  # to be sent back with the answer
    subject: Subject | None
    undecided: _Undecided | None = None


# -- reading ---------------------------------------------------------------------------------------------------------


def _tree(message: bytes) -> Element:
    """Return the root of a document without DTD, and so without entities of its own. Raises BadRequest."""
    if len(message) > LARGEST:
        raise BadRequest(f"the message is longer than {LARGEST} bytes")
    depth, builder = 0, TreeBuilder()

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise BadRequest(f"more than {DEEPEST} elements are inside each other")
        builder.start(_name(name), {_name(key): value for key, value in attributes.items()})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_name(name))

    def refuse(*_: object) -> None:
        raise BadRequest("a SOAP message has neither DTD nor processing instruction")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = parser.ProcessingInstructionHandler = refuse
    try:
        parser.Parse(message, True)
    except (expat.ExpatError, ValueError) as error:  # ValueError: an encoding that Python has not; BadRequest is one
        raise error if isinstance(error, BadRequest) else BadRequest(f"not XML: {error}") from error
    except LookupError as error:
        raise BadRequest(f"not XML: {error}") from error
    return builder.close()


def _name(name: str) -> str:
    """Return expat's "namespace local" as ElementTree writes it."""
    namespace, found, local = name.rpartition(" ")
    return f"{{{namespace}}}{local}" if found else local


def _only(parent: Element, name: str) -> Element:
    """Return the only child of that name. Raises BadRequest."""
    found = parent.findall(name)
    if len(found) != 1:
        raise BadRequest(f"{parent.tag} must have one child {name}, not {len(found)}")
    return found[0]


def query(message: bytes) -> Query:
    """Return the query in a SOAP envelope.

    Raises:
        BadRequest: there is none; the answer is a ``fault``.
    """
    envelope = _tree(message)
    if envelope.tag != f"{{{_SOAP}}}Envelope":
        raise BadRequest(f"{envelope.tag} is not the envelope of SOAP 1.1, {{{_SOAP}}}Envelope")
    for entry in envelope.findall(f"{{{_SOAP}}}Header/*"):
        if entry.get(f"{{{_SOAP}}}mustUnderstand") == "1":
            raise BadRequest(f"the header {entry.tag} is not understood here, and must be")
    body = _only(envelope, f"{{{_SOAP}}}Body")
    profile = next((name for name in _PROFILES if [child.tag for child in body] == [_query(name)]), None)
    if profile is None:
        raise BadRequest(f"the body must have one child, {' or '.join(map(_query, _PROFILES))}")
    asked = body[0]
    context = _only(asked, f"{{{_CONTEXT}}}Request")
    returned = context if asked.get("ReturnContext") in {"true", "1"} else None
    if not (name := asked.get("ID")):
        raise BadRequest("the query has no ID")
    try:
        return Query(name, profile, returned, _subject(context))
    except _Undecided as undecided:
        return Query(name, profile, returned, None, undecided)
    except BadRequest as error:
        return Query(name, profile, returned, None, _Undecided("Indeterminate", "syntax-error", str(error)))


def _query(profile: str) -> str:
    return f"{{{profile}}}XACMLAuthzDecisionQuery"


def _subject(context: Element) -> Subject:
    """Return who is asked about. Raises _Undecided and BadRequest."""
    given = {kind: _attributes(_only(context, f"{{{_CONTEXT}}}{kind}")) for kind in ("Subject", "Resource", "Action")}
    for kind, name, known in (("Resource", _RESOURCE, _RESOURCES), ("Action", _ACTION, _ACTIONS)):
        if (value := _value(given[kind], name)) not in known:
            reason = f"{name} is {value!r}; the site has a policy for {', '.join(sorted(known))}"
            raise _Undecided("NotApplicable", "ok", reason)
    fqans = given["Subject"].get(_FQAN, [])
    if _PRIMARY_FQAN in given["Subject"]:
        primary = _value(given["Subject"], _PRIMARY_FQAN)
        fqans = [primary, *(fqan for fqan in fqans if fqan != primary)]
    return Subject(_value(given["Subject"], _DN), tuple(fqans))


def _attributes(parent: Element) -> dict[str, list[str]]:
    """Return the texts of all attributes, by AttributeId."""
    found: dict[str, list[str]] = {}
    for attribute in parent.findall(f"{{{_CONTEXT}}}Attribute"):
        if attribute.get("DataType") in _TEXTS:
            values = found.setdefault(attribute.get("AttributeId", ""), [])
            values += ["".join(value.itertext()).strip() for value in attribute]
    return found


def _value(attributes: dict[str, list[str]], name: str) -> str:
    """Return the only value of an attribute."""
    values = attributes.get(name, [])
    if not values:
        raise _Undecided("Indeterminate", "missing-attribute", f"the attribute {name} is missing, or no string")
    if len(values) > 1:
        raise BadRequest(f"the attribute {name} has {len(values)} values, not one")
    return values[0]


# -- writing ---------------------------------------------------------------------------------------------------------


def _enveloped(body: str) -> bytes:
    return f'<soap:Envelope xmlns:soap="{_SOAP}"><soap:Body>{body}</soap:Body></soap:Envelope>'.encode()


def fault(reason: str, whose: str = "Client") -> bytes:
    """Return the SOAP fault for a message that is no query; ``whose`` fault: Client or Server."""
    words = f"<faultcode>soap:{whose}</faultcode><faultstring>{escape(_printable(reason))}</faultstring>"
    return _enveloped(f"<soap:Fault>{words}</soap:Fault>")


def response(asked: Query, given: Answer | None, issuer: str, now: dt.datetime, name: Callable[[], str]) -> bytes:
    """Return the SOAP message that answers a query.

    Args:
        asked: the query.
        given: the site's answer; None where the query is undecided.
        issuer: who answers (a URI).
        now: time of the answer, in UTC.
        name: makes a new XML ID.
    """
    response, assertion = (
        f'ID={quoteattr(name())} Version="2.0" IssueInstant="{now:%Y-%m-%dT%H:%M:%SZ}"' for _ in range(2)
    )
    context = tostring(asked.context, encoding="unicode") if asked.context is not None else ""
    return _enveloped(
        f'<samlp:Response xmlns:samlp="urn:oasis:names:tc:SAML:2.0:protocol" {response}'
        f" InResponseTo={quoteattr(asked.id)}>"
        f'<saml:Issuer xmlns:saml="urn:oasis:names:tc:SAML:2.0:assertion">{escape(issuer)}</saml:Issuer>'
        '<samlp:Status><samlp:StatusCode Value="urn:oasis:names:tc:SAML:2.0:status:Success"/></samlp:Status>'
        f'<saml:Assertion xmlns:saml="urn:oasis:names:tc:SAML:2.0:assertion" {assertion}>'
        f"<saml:Issuer>{escape(issuer)}</saml:Issuer>"
        f'<saml:Statement xmlns:xsi="{_XSD}-instance" xmlns:xacml-saml="{_PROFILES[asked.profile]}"'
        ' xsi:type="xacml-saml:XACMLAuthzDecisionStatementType">'
        f'<xacml-context:Response xmlns:xacml-context="{_CONTEXT}">{_result(asked, given)}</xacml-context:Response>'
        f"{context}</saml:Statement></saml:Assertion></samlp:Response>"
    )


def _result(asked: Query, given: Answer | None) -> str:
    reason, status, obligations = "", "ok", ""
    if given is None:
        undecided = asked.undecided or _Undecided("Indeterminate", "processing-error", "there is no answer")
        decision, status, reason = undecided.decision, undecided.status, undecided.reason
    elif given.account is None:
        decision, reason = "Deny", given.reason
    else:
        decision, account = "Permit", given.account
        numbers = [("posix-uid", "integer", account.uid), ("posix-gid", "integer", account.gid)]
        obligations = _obligation("uidgid", numbers)
        obligations += _obligation("secondary-gids", [("posix-gid", "integer", gid) for gid in account.groups])
        obligations += _obligation("username", [("username", "string", account.name)])
        obligations = f'<xacml:Obligations xmlns:xacml="{_POLICY}">{obligations}</xacml:Obligations>'
    message = f"<xacml-context:StatusMessage>{escape(_printable(reason))}</xacml-context:StatusMessage>"
    return (
        f"<xacml-context:Result><xacml-context:Decision>{decision}</xacml-context:Decision><xacml-context:Status>"
        f'<xacml-context:StatusCode Value="{_STATUS}:{status}"/>{message if reason else ""}</xacml-context:Status>'
        f"{obligations}</xacml-context:Result>"
    )


def _obligation(name: str, assignments: Sequence[tuple[str, str, int | str]]) -> str:
    """Return an obligation of the profile, or nothing where it assigns nothing."""
    words = "".join(
        f'<xacml:AttributeAssignment AttributeId="{_GRID}/attribute/{key}" DataType="{_XSD}#{kind}">'
        f"{value}</xacml:AttributeAssignment>"
        for key, kind, value in assignments
    )
    whole = f'<xacml:Obligation ObligationId="{_GRID}/obligation/{name}" FulfillOn="Permit">{words}</xacml:Obligation>'
    return whole if assignments else ""


def _printable(text: str) -> str:
    """Return ``text`` without what XML 1.0 cannot hold."""
    return "".join(character if character.isprintable() else "?" for character in text)
