"""The ads of the protocol: their kinds, names and attributes, as glideinWMS 3.10 writes and reads them.

Every class has ``to_ad`` and ``from_ad``; an ad is a plain mapping of attribute names to strings, numbers and
booleans. All trust hangs on ``AuthenticatedIdentity``, which the collector adds and no sender can choose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

from pilotbed.pool.values import AbsurdValue, Ad, Value
from pilotbed.pool.values import number as read_number
from pilotbed.pool.values import text as read_text

from . import ProtocolError
from .crypto import FactoryKey, SessionKey
from .manifest import Signed

VERSION = "pilotbed 0.1 (glideinWMS 3.10 protocol)"

#: The pilot checks sha256 digests only; sha1 is named since a glideinWMS frontend wants to see it in the list.
SIGN_TYPES = ("sha1", "sha256")

_NAME = re.compile(r"[A-Za-z0-9_@-][A-Za-z0-9._@-]*")
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_URL = re.compile(r"https?://[A-Za-z0-9._-]+(:[0-9]+)?(/[A-Za-z0-9._~/-]*)?")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ESCAPED_NEWLINE = re.compile(r"\\+n")

_ENCRYPTED = "GlideinEncParam"
_PARAMETER = "GlideinParam"
_MONITOR = "GlideinMonitor"
_CONFIG = "GlideinConfig"


class Kind(Enum):
    """GlideinMyType, with the collector commands that carry the kind.

    The command decides what the collector wants to see before it takes the ad: ADVERTISE_MASTER for requests,
    DAEMON for the others.
    """

    OFFER = ("glidefactory", "UPDATE_AD_GENERIC", "INVALIDATE_ADS_GENERIC")
    GLOBAL_OFFER = ("glidefactoryglobal", "UPDATE_AD_GENERIC", "INVALIDATE_ADS_GENERIC")
    CREDENTIALS = ("glideclientglobal", "UPDATE_MASTER_AD", "INVALIDATE_MASTER_ADS")
    REQUEST = ("glideclient", "UPDATE_MASTER_AD", "INVALIDATE_MASTER_ADS")
    ANSWER = ("glidefactoryclient", "UPDATE_LICENSE_AD", "INVALIDATE_LICENSE_ADS")
    RESOURCE = ("glideresource", "UPDATE_AD_GENERIC", "INVALIDATE_ADS_GENERIC")
    GROUP = ("glidegroup", "UPDATE_AD_GENERIC", "INVALIDATE_ADS_GENERIC")

    def __init__(self, my_type: str, update: str, invalidate: str) -> None:
        self.my_type = my_type
        self.update = update
        self.invalidate = invalidate

    def head(self, name: str) -> dict[str, Value]:
        """Return the attributes that every ad of this kind begins with."""
        return {"MyType": self.my_type, "GlideinMyType": self.my_type, "Name": name, "GlideinWMSVersion": VERSION}


def check_name(text: str, what: str, at: bool = True) -> str:
    """Return ``text`` if it is a name of the protocol, so that it may become part of a file name or a constraint.

    Args:
        text: the name.
        what: the attribute, for the message.
        at: whether ``@`` may occur; not in the parts that names are joined from.

    Raises:
        ProtocolError: empty, begins with a dot, or holds anything but letters, digits and ``._@-``.
    """
    if not (_NAME if at else _PLAIN).fullmatch(text):
        raise ProtocolError(f"{what} {text!r} may hold only letters, digits and ._{'@' if at else ''}-")
    return text


def _text(ad: Ad, name: str, default: str | None = None) -> str:
    try:
        return read_text(ad, name, default)
    except AbsurdValue as error:
        raise ProtocolError(str(error)) from error


def _count(ad: Ad, name: str, default: int | None = None) -> int:
    try:
        return read_number(ad, name, default)
    except AbsurdValue as error:
        raise ProtocolError(str(error)) from error


def _with_prefix(ad: Ad, prefix: str) -> dict[str, Value]:
    return {name.removeprefix(prefix): value for name, value in ad.items() if name.startswith(prefix)}


def _prefixed(values: Ad, prefix: str) -> dict[str, Value]:
    return {prefix + name: value for name, value in values.items()}


def _escape(pem: str) -> str:
    return pem.replace("\n", "\\n")


def _unescape(text: str) -> str:
    return _ESCAPED_NEWLINE.sub("\n", text)


@dataclass(frozen=True)
class FactoryName:
    """A factory as ads name it: ``GLIDEIN@FACTORY``; glidein is the name of one set of entries."""

    glidein: str
    factory: str

    def __str__(self) -> str:
        return f"{self.glidein}@{self.factory}"

    def entry(self, entry: str) -> str:
        """Return the name of ``entry`` in ads: ``ENTRY@GLIDEIN@FACTORY``."""
        return f"{entry}@{self}"


@dataclass(frozen=True)
class GlobalOffer:
    """glidefactoryglobal: the factory's public key."""

    name: FactoryName
    public_pem: str
    key_id: str
    identity: str = ""

    def to_ad(self) -> dict[str, Value]:
        """Return the ad."""
        return Kind.GLOBAL_OFFER.head(str(self.name)) | {
            "FactoryName": self.name.factory,
            "GlideinName": self.name.glidein,
            "PubKeyID": self.key_id,
            "PubKeyType": "RSA",
            "PubKeyValue": _escape(self.public_pem),
        }

    @classmethod
    def from_ad(cls, ad: Ad) -> Self:
        """Read an ad.

        Raises:
            ProtocolError: an attribute is missing, or the key is not RSA.
        """
        if _text(ad, "PubKeyType") != "RSA":
            raise ProtocolError("PubKeyType is not RSA")
        return cls(
            name=FactoryName(_text(ad, "GlideinName"), _text(ad, "FactoryName")),
            public_pem=_unescape(_text(ad, "PubKeyValue")),
            key_id=_text(ad, "PubKeyID"),
            identity=_text(ad, "AuthenticatedIdentity", ""),
        )


@dataclass(frozen=True)
class Offer:
    """glidefactory: one entry, what a pilot there would look like and what may be asked for.

    ``attributes`` are the entry's own (GLIDEIN_Site ...), ``parameters`` the ones that a frontend may set.
    """

    name: FactoryName
    entry: str
    attributes: Mapping[str, Value]
    parameters: Mapping[str, str]
    in_downtime: bool
    public_pem: str
    key_id: str
    limits: Mapping[str, int] = field(default_factory=dict)
    monitor: Mapping[str, Value] = field(default_factory=dict)
    identity: str = ""

    @property
    def full_name(self) -> str:
        """``ENTRY@GLIDEIN@FACTORY``."""
        return self.name.entry(self.entry)

    def to_ad(self) -> dict[str, Value]:
        """Return the ad. Booleans become the strings that glideinWMS uses in this kind."""
        ad = Kind.OFFER.head(self.full_name) | {
            "FactoryName": self.name.factory,
            "GlideinName": self.name.glidein,
            "EntryName": self.entry,
            "SupportedSignTypes": ",".join(SIGN_TYPES),
            "PubKeyID": self.key_id,
            "PubKeyType": "RSA",
            "PubKeyValue": _escape(self.public_pem),
            "GlideinAllowx509_Proxy": "True",
            "GlideinRequirex509_Proxy": "True",
            "GlideinRequireGlideinProxy": "False",
            "GLIDEIN_In_Downtime": str(self.in_downtime),
        }
        ad |= {name: str(value) if isinstance(value, bool) else value for name, value in self.attributes.items()}
        return (
            ad
            | _prefixed(self.parameters, _PARAMETER)
            | _prefixed(self.limits, _CONFIG)
            | _prefixed(self.monitor, _MONITOR)
        )

    @classmethod
    def from_ad(cls, ad: Ad) -> Self:
        """Read an ad.

        Raises:
            ProtocolError: an attribute is missing, the key is not RSA, or the names do not fit together.
        """
        key = GlobalOffer.from_ad(ad)
        entry = check_name(_text(ad, "EntryName"), "EntryName", at=False)
        if _text(ad, "Name") != key.name.entry(entry):
            raise ProtocolError(f"Name is not {key.name.entry(entry)}")
        own = ("Glidein", "PubKey", "My", "Update", "Supported")
        return cls(
            name=key.name,
            entry=entry,
            attributes={name: value for name, value in ad.items() if not name.startswith(own)},
            parameters={name: str(value) for name, value in _with_prefix(ad, _PARAMETER).items()},
            in_downtime=str(ad.get("GLIDEIN_In_Downtime", "False")).lower() == "true",
            public_pem=key.public_pem,
            key_id=key.key_id,
            limits={n: int(v) for n, v in _with_prefix(ad, _CONFIG).items() if isinstance(v, int)},
            monitor=_with_prefix(ad, _MONITOR),
            identity=key.identity,
        )


@dataclass(frozen=True)
class Sealed:
    """What only one factory can read: values under a session key, and who says to have sent them."""

    key_id: str
    key_code: str
    encrypted_identity: str
    values: Mapping[str, str]

    @classmethod
    def seal(cls, session: SessionKey, key_code: str, key_id: str, identity: str, values: Mapping[str, str]) -> Self:
        """Encrypt ``values`` and ``identity`` (the sender's own at that collector) under ``session``."""
        return cls(
            key_id, key_code, session.encrypt(identity), {name: session.encrypt(text) for name, text in values.items()}
        )

    def to_ad(self) -> dict[str, Value]:
        """Return the attributes."""
        return {
            "ReqPubKeyID": self.key_id,
            "ReqEncKeyCode": self.key_code,
            "ReqEncIdentity": self.encrypted_identity,
        } | _prefixed(self.values, _ENCRYPTED)

    @classmethod
    def from_ad(cls, ad: Ad) -> Self:
        """Read the attributes, still encrypted.

        Raises:
            ProtocolError: one is missing or not a string.
        """
        return cls(
            key_id=_text(ad, "ReqPubKeyID"),
            key_code=_text(ad, "ReqEncKeyCode"),
            encrypted_identity=_text(ad, "ReqEncIdentity"),
            values={name: _text(ad, _ENCRYPTED + name) for name in _with_prefix(ad, _ENCRYPTED)},
        )

    def open(self, key: FactoryKey) -> tuple[str, dict[str, str]]:
        """Return the claimed identity and the values.

        Raises:
            ProtocolError: anything in it cannot be decrypted: then nothing of it counts.
        """
        session = key.unwrap(self.key_code)
        identity = session.decrypt(self.encrypted_identity, "ReqEncIdentity")
        return identity, {name: session.decrypt(code, _ENCRYPTED + name) for name, code in self.values.items()}


@dataclass(frozen=True)
class Client:
    """A frontend group as ads name it: ``FRONTEND.GROUP``."""

    frontend: str
    group: str

    def __str__(self) -> str:
        return f"{self.frontend}.{self.group}"

    @classmethod
    def from_ad(cls, ad: Ad) -> Self:
        """Read FrontendName, GroupName and ClientName.

        Raises:
            ProtocolError: missing, bad characters, or ClientName is not the other two.
        """
        client = cls(
            check_name(_text(ad, "FrontendName"), "FrontendName"), check_name(_text(ad, "GroupName"), "GroupName")
        )
        if _text(ad, "ClientName") != str(client):
            raise ProtocolError(f"ClientName is not {client}")
        return client

    def to_ad(self) -> dict[str, Value]:
        """Return the attributes."""
        return {"ClientName": str(self), "FrontendName": self.frontend, "GroupName": self.group}


@dataclass(frozen=True)
class Credentials:
    """glideclientglobal: a frontend group's credentials, encrypted for one factory."""

    factory: str
    client: Client
    sealed: Sealed
    identity: str = ""

    @property
    def name(self) -> str:
        """``GLIDEIN@FACTORY@FRONTEND.GROUP``."""
        return f"{self.factory}@{self.client}"

    @staticmethod
    def values(security_name: str, credentials: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Return what to seal: for each credential id its (SecurityClass, content)."""
        values = {"SecurityName": security_name, "NumberOfCredentials": str(len(credentials))}
        for name, (security_class, content) in credentials.items():
            values |= {name: content, f"SecurityClass{name}": security_class}
        return values

    @staticmethod
    def split(values: Mapping[str, str]) -> tuple[str, dict[str, tuple[str, str]]]:
        """Undo ``values``: return the SecurityName and each credential's (SecurityClass, content).

        Raises:
            ProtocolError: a part is missing.
        """
        rest = dict(values)
        try:
            security_name = rest.pop("SecurityName")
            rest.pop("NumberOfCredentials", None)
            classes = {name for name in rest if name.startswith("SecurityClass")}
            names = set(rest) - classes
            return security_name, {
                check_name(name, "credential id", at=False): (rest[f"SecurityClass{name}"], rest[name])
                for name in sorted(names)
            }
        except KeyError as error:
            raise ProtocolError(f"{_ENCRYPTED}{error.args[0]} is missing") from error

    def to_ad(self) -> dict[str, Value]:
        """Return the ad."""
        return (
            Kind.CREDENTIALS.head(self.name) | self.client.to_ad() | {"ReqGlidein": self.factory} | self.sealed.to_ad()
        )

    @classmethod
    def from_ad(cls, ad: Ad) -> Self:
        """Read an ad.

        Raises:
            ProtocolError: an attribute is missing or has bad characters.
        """
        client = Client.from_ad(ad)
        factory = check_name(_text(ad, "Name"), "Name").removesuffix(f"@{client}")
        return cls(factory, client, Sealed.from_ad(ad), _text(ad, "AuthenticatedIdentity", ""))


class Removal(Enum):
    """ReqRemoveExcess: what of the pilots above the request may be removed; each includes those before it."""

    NO = "NO"
    WAIT = "WAIT"
    UNREG = "UNREG"
    IDLE = "IDLE"
    ALL = "ALL"


@dataclass(frozen=True)
class ClientStage:
    """Where the frontend's own stage is; Web* attributes of a request."""

    web: str
    signtype: str
    main: Signed
    group: Signed
    group_web: str

    def to_ad(self) -> dict[str, Value]:
        """Return the attributes."""
        return {
            "WebURL": self.web,
            "WebSignType": self.signtype,
            "WebDescriptFile": self.main.descript,
            "WebDescriptSign": self.main.sign,
            "WebGroupURL": self.group_web,
            "WebGroupDescriptFile": self.group.descript,
            "WebGroupDescriptSign": self.group.sign,
        }

    @classmethod
    def from_ad(cls, ad: Ad) -> Self:
        """Read the attributes; they become arguments of a job, so nothing odd may be in them.

        Raises:
            ProtocolError: one is missing, or is not a URL, a plain file name or a digest.
        """

        def matching(name: str, pattern: re.Pattern[str]) -> str:
            text = _text(ad, name)
            if not pattern.fullmatch(text):
                raise ProtocolError(f"{name} {text!r} does not match {pattern.pattern}")
            return text

        return cls(
            web=matching("WebURL", _URL),
            signtype=matching("WebSignType", _PLAIN),
            main=Signed(matching("WebDescriptFile", _PLAIN), matching("WebDescriptSign", _DIGEST)),
            group=Signed(matching("WebGroupDescriptFile", _PLAIN), matching("WebGroupDescriptSign", _DIGEST)),
            group_web=matching("WebGroupURL", _URL),
        )


@dataclass(frozen=True)
class Request:
    """glideclient: how many pilots a frontend group wants to see queued (idle) and in all (max) at one entry."""

    entry: str
    client: Client
    credential: str
    idle: int
    maximum: int
    removal: Removal
    margin: int
    idle_lifetime: int
    stage: ClientStage
    parameters: Mapping[str, str]
    sealed: Sealed
    monitor: Mapping[str, int] = field(default_factory=dict)
    identity: str = ""

    @property
    def name(self) -> str:
        """``CREDENTIAL_ENTRY@GLIDEIN@FACTORY@FRONTEND.GROUP``; ``entry`` is the full name of the entry."""
        return f"{self.credential}_{self.entry}@{self.client}"

    @property
    def entry_short(self) -> str:
        """The entry's own name, without ``@GLIDEIN@FACTORY``."""
        return self.entry.partition("@")[0]

    def to_ad(self) -> dict[str, Value]:
        """Return the ad."""
        return (
            Kind.REQUEST.head(self.name)
            | self.client.to_ad()
            | {
                "FrontendHAMode": "master",
                "ReqName": self.entry,
                "ReqGlidein": self.entry,
                "ReqIdleGlideins": self.idle,
                "ReqMaxGlideins": self.maximum,
                "ReqRemoveExcess": self.removal.value,
                "ReqRemoveExcessMargin": self.margin,
                "ReqIdleLifetime": str(self.idle_lifetime),
            }
            | self.stage.to_ad()
            | _prefixed(self.parameters, _PARAMETER)
            | _prefixed(self.monitor, _MONITOR)
            | self.sealed.to_ad()
        )

    @classmethod
    def from_ad(cls, ad: Ad) -> Self:
        """Read an ad, still encrypted.

        Raises:
            ProtocolError: an attribute is missing, has bad characters or an unknown value.
        """
        client = Client.from_ad(ad)
        entry = check_name(_text(ad, "ReqGlidein"), "ReqGlidein")
        name = check_name(_text(ad, "Name"), "Name")
        if not name.endswith(f"_{entry}@{client}"):
            raise ProtocolError(f"Name {name} does not end in _{entry}@{client}")
        try:
            removal = Removal(_text(ad, "ReqRemoveExcess", "NO"))
        except ValueError as error:
            raise ProtocolError(f"ReqRemoveExcess: {error}") from error
        return cls(
            entry=entry,
            client=client,
            credential=name.removesuffix(f"_{entry}@{client}"),
            idle=_count(ad, "ReqIdleGlideins"),
            maximum=_count(ad, "ReqMaxGlideins"),
            removal=removal,
            margin=_count(ad, "ReqRemoveExcessMargin", 0),
            idle_lifetime=_count(ad, "ReqIdleLifetime", 0),
            stage=ClientStage.from_ad(ad),
            parameters={name: str(value) for name, value in _with_prefix(ad, _PARAMETER).items()},
            sealed=Sealed.from_ad(ad),
            monitor={n: int(v) for n, v in _with_prefix(ad, _MONITOR).items() if isinstance(v, int)},
            identity=_text(ad, "AuthenticatedIdentity", ""),
        )


def answer_ad(factory: FactoryName, entry: str, request: Request, monitor: Mapping[str, Value]) -> dict[str, Value]:
    """Return glidefactoryclient: what ``entry`` of ``factory`` has made of ``request``."""
    return (
        Kind.ANSWER.head(f"{factory.entry(entry)}@{request.client}")
        | {
            "ReqGlidein": factory.entry(entry),
            "ReqFactoryName": factory.factory,
            "ReqGlideinName": factory.glidein,
            "ReqEntryName": entry,
            "ReqClientName": str(request.client),
            "ReqClientReqName": request.entry,
        }
        | _prefixed(monitor, _MONITOR)
    )


def answered(ad: Ad) -> tuple[str, dict[str, Value]]:
    """Return of a glidefactoryclient ad the entry's full name and what the factory says of it.

    Raises:
        ProtocolError: it does not say which entry it is about.
    """
    return _text(ad, "ReqGlidein"), _with_prefix(ad, _MONITOR)


def _for_users(kind: Kind, name: str, client: Client) -> dict[str, Value]:
    return kind.head(name) | {
        "GlideClientName": str(client),
        "GlideFrontendName": client.frontend,
        "GlideGroupName": client.group,
    }


def group_ad(client: Client, values: Mapping[str, Value]) -> dict[str, Value]:
    """Return glidegroup: for users, which jobs a frontend group looks at, how, and what stops it.

    glideinWMS has no such ad; it is in the users' pool only.
    """
    return _for_users(Kind.GROUP, str(client), client) | _prefixed(values, "GlideClient")


def resource_ad(
    offer: Offer, client: Client, monitor: Mapping[str, Value], answer: Mapping[str, Value] | None = None
) -> dict[str, Value]:
    """Return glideresource: for users, what the frontend decided about the entry of ``offer`` and why.

    ``answer`` is what the factory has made of it.
    """
    shown = {name: value for name, value in offer.attributes.items() if name.startswith("GLIDEIN_")}
    return (
        _for_users(Kind.RESOURCE, f"{offer.full_name}@{client}", client)
        | {"GlideFactoryName": offer.full_name, "GLIDEIN_In_Downtime": str(offer.in_downtime)}
        | shown
        | _prefixed(monitor, "GlideClientMonitor")
        | _prefixed(answer or {}, "GlideFactoryMonitor")
    )
