"""Who may ask the factory for what: the checks of glideinWMS 3.10, in its order, as pure functions.

The collector has told who sent an ad (AuthenticatedIdentity). An ad that claims to come from somebody else, that
cannot be read, or that asks for more than its SecurityClass may, is refused with a reason and changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pilotbed.pool.values import Ad
from pilotbed.protocol import ProtocolError
from pilotbed.protocol.ads import SIGN_TYPES, Client, Credentials, FactoryName, Request, Sealed, check_name
from pilotbed.protocol.crypto import FactoryKey
from pilotbed.proxy import Proxy, ProxyError

from . import gridtypes
from .config import Entry, Frontend
from .tokens import Token, TokenError

#: What auth_method grid_proxy needs; a request with less is refused.
_GRID_PROXY = frozenset({"SecurityName", "SecurityClass", "SubmitProxy"})


class Refusal(Exception):
    """An ad that the factory does not believe; the message says which check failed."""


@dataclass(frozen=True)
class Rules:
    """What a factory believes: its own name and key, and what is configured.

    ``parameters`` are those that a frontend may set at every entry, with their defaults.
    """

    name: FactoryName
    key: FactoryKey
    frontends: Mapping[str, Frontend]
    entries: Mapping[str, Entry]
    parameters: Mapping[str, str]


@dataclass(frozen=True, order=True)
class CredentialName:
    """A credential in the factory's store."""

    security_name: str
    security_class: str
    client: str
    credential: str

    @property
    def filename(self) -> str:
        """Its file's name: the parts hold no comma, so that two never meet."""
        return f"{self.security_name},{self.security_class},{self.client},{self.credential}.pem"

    @classmethod
    def parse(cls, filename: str) -> CredentialName | None:
        """Return the name of ``filename``; None if it is no credential's."""
        stem, dot, suffix = filename.rpartition(".")
        parts = stem.split(",")
        return cls(*parts) if (dot, suffix, len(parts)) == (".", "pem", 4) else None


@dataclass(frozen=True)
class Trusted:
    """A request that passed every check.

    ``closed_why`` is empty if it may get new pilots; ``tokens`` are for them. What else came with it sealed is in
    ``left_out``, by name with the reason.
    """

    request: Request
    credential: CredentialName
    parameters: Mapping[str, str]
    closed_why: str = ""
    tokens: tuple[Token, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def security(self) -> str:
        """``SECURITYNAME:CLASS``, what limits are counted by."""
        return f"{self.credential.security_name}:{self.credential.security_class}"

    @property
    def outputs(self) -> str:
        """What the names of its pilots' output begin with."""
        return f"{self.credential.security_name}_{self.request.client}"


def _open(sealed: Sealed, key: FactoryKey, identity: str) -> dict[str, str]:
    """Decrypt, and compare who the sender says to be with who the collector says it is (checks 1 to 4)."""
    if sealed.key_id != key.key_id:
        raise Refusal("ReqPubKeyID is not this factory's key (of an earlier start?)")
    claimed, values = sealed.open(key)
    if not identity or claimed != identity:
        raise Refusal(f"ReqEncIdentity ({claimed}) is not the sender's ({identity or 'unauthenticated'})")
    return values


def _known(security_name: str, security_class: str, identity: str, frontends: Mapping[str, Frontend]) -> None:
    """Refuse a SecurityName that is not configured, is somebody else's, or has no such class (6, 9, 12)."""
    frontend = frontends.get(security_name)
    if frontend is None:
        raise Refusal(f"SecurityName {security_name} is not configured")
    if frontend.identity != identity:
        raise Refusal(f"SecurityName {security_name} belongs to {frontend.identity}, not to {identity}")
    if security_class not in frontend.classes:
        raise Refusal(f"SecurityClass {security_class} is not one of {security_name}'s")


def check_credentials(ad: Ad, rules: Rules) -> dict[CredentialName, str]:
    """Return the credentials of a glideclientglobal ad, by where they belong.

    Raises:
        Refusal: a check failed; nothing of the ad may be used.
    """
    try:
        message = Credentials.from_ad(ad)
        if message.factory != str(rules.name):
            raise Refusal(f"for {message.factory}, not for this factory")
        security_name, credentials = Credentials.split(_open(message.sealed, rules.key, message.identity))
        found = {}
        for name, (security_class, content) in credentials.items():
            _known(security_name, security_class, message.identity, rules.frontends)
            Proxy.read(content)
            found[_credential(security_name, security_class, message.client, name)] = content
    except (ProtocolError, ProxyError) as error:
        raise Refusal(str(error)) from error
    return found


def _credential(security_name: str, security_class: str, client: Client, name: str) -> CredentialName:
    return CredentialName(
        check_name(security_name, "SecurityName", at=False),
        check_name(security_class, "SecurityClass", at=False),
        str(client),
        check_name(name, "credential id", at=False),
    )


def check_request(ad: Ad, rules: Rules, stored: Collection[CredentialName], downtimes: Mapping[str, str]) -> Trusted:
    """Return what a glideclient ad may ask for.

    Args:
        ad: the ad, with the AuthenticatedIdentity that the collector added.
        rules: this factory's.
        stored: credentials that the factory has.
        downtimes: reason by entry name, ``SECURITYNAME:CLASS`` or ``ALL``.

    Raises:
        Refusal: a check failed; the request does not count.
    """
    try:
        request = Request.from_ad(ad)
        entry = rules.entries.get(request.entry_short)
        if entry is None or request.entry != rules.name.entry(request.entry_short):
            raise Refusal(f"ReqGlidein {request.entry} is not an entry of this factory")
        if request.stage.signtype not in SIGN_TYPES:
            raise Refusal(f"WebSignType {request.stage.signtype} is not one of {', '.join(SIGN_TYPES)}")
        values = _open(request.sealed, rules.key, request.identity)
        if missing := _GRID_PROXY - values.keys():
            came = ", ".join(sorted(values)) or "nothing"
            raise Refusal(f"grid_proxy needs {', '.join(sorted(missing))}; what came is {came}")
        credential = _credential(values["SecurityName"], values["SecurityClass"], request.client, values["SubmitProxy"])
        _known(credential.security_name, credential.security_class, request.identity, rules.frontends)
    except ProtocolError as error:
        raise Refusal(str(error)) from error
    if credential not in stored:
        raise Refusal(f"credential {credential.credential} was not sent: no glideclientglobal of {request.client}")
    may_set = dict(rules.parameters) | dict(entry.parameters)
    parameters = may_set | {name: value for name, value in request.parameters.items() if name in may_set}
    security = f"{credential.security_name}:{credential.security_class}"
    closed = next((f"downtime of {name}: {downtimes[name]}" for name in ("ALL", request.entry_short, security)
                   if name in downtimes), "")  # fmt: skip
    allowed = entry.allow_frontends
    if not closed and allowed and security not in allowed and credential.security_name not in allowed:
        closed = f"entry {request.entry_short} does not allow {security}"
    tokens, left_out = _additions(values, request.entry_short, entry)
    return Trusted(request, credential, {name: value for name, value in parameters.items() if value}, closed, tokens,
                   left_out)  # fmt: skip


def _additions(values: Mapping[str, str], name: str, entry: Entry) -> tuple[tuple[Token, ...], dict[str, str]]:
    """Return the tokens among what came sealed with a request for entry ``name``, and why the rest is left out.

    glideinWMS 3.10 sends ``ENTRY.idtoken``, for the pool, and ``frontend_scitoken``. One that is no good costs itself
    only, not the request: pilots have their proxy.
    """
    kinds = {f"{name}.idtoken": "idtoken", "frontend_scitoken": "scitoken"}
    tokens, left_out = [], {}
    for addition in sorted(values.keys() - _GRID_PROXY):
        try:
            if addition not in kinds:
                raise TokenError("this factory knows no such parameter")
            if not gridtypes.load(entry.gridtype).takes_files:
                raise TokenError(f"a computing element of gridtype {entry.gridtype} takes no file to a pilot")
            tokens.append(Token.read(kinds[addition], values[addition]))
        except TokenError as error:
            left_out[addition] = str(error)
    return tuple(tokens), left_out
