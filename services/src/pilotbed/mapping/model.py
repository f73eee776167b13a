"""What is asked and what is answered, whatever the form on the wire."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from . import LARGEST_DN

#: Bytes of a message, in any form; a request with all FQANs that are allowed is smaller.
LARGEST = 1 << 16
LARGEST_FQAN = 256
MOST_FQANS = 64
LOWEST_UID = 1000  # no system account is ever a user's

# OpenSSL's one-line form (`pilotbed.dn`). Types are not looked up: LCMAPS's OpenSSL may know more of them than we do.
_DN = re.compile(r"/[A-Za-z0-9][A-Za-z0-9.-]*=[\x20-\x7e]*")
# GFD.182, VOMS Attribute Certificate Format: /vo/group/Role=role/Capability=NULL.
_FQAN = re.compile(r"(?:/[A-Za-z0-9_.-]+)+(?:/Role=[A-Za-z0-9_.-]+)?(?:/Capability=[A-Za-z0-9_.-]+)?")
_ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


class BadRequest(ValueError):
    """A message that cannot be used; the text says what is wrong with it and is for whoever sent it."""


@dataclass(frozen=True)
class Subject:
    """A user as a VO has certified him: end-entity DN in slash form, and FQANs, the primary one first.

    Raises:
        BadRequest: one of them has not the form of such a name.
    """

    dn: str
    fqans: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.dn) > LARGEST_DN or not _DN.fullmatch(self.dn):
            raise BadRequest(f"DN {self.dn[:80]!r} is not of the form /DC=org/.../CN=name ({LARGEST_DN} bytes at most)")
        if len(self.fqans) > MOST_FQANS:
            raise BadRequest(f"{len(self.fqans)} FQANs are more than {MOST_FQANS}")
        for fqan in self.fqans:
            if len(fqan) > LARGEST_FQAN or not _FQAN.fullmatch(fqan):
                raise BadRequest(f"FQAN {fqan[:80]!r} is not of the form /vo/group/Role=role/Capability=NULL")


@dataclass(frozen=True)
class Account:
    """A local account: name, uid, primary gid and further gids.

    Raises:
        BadRequest: no account can be like that.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not _ACCOUNT.fullmatch(self.name):
            raise BadRequest(f"{self.name[:80]!r} is not the name of an account")
        for number in (self.uid, self.gid, *self.groups):
            if not 0 <= number < 0xFFFFFFFF:
                raise BadRequest(f"{number} is neither uid nor gid")


@dataclass(frozen=True)
class Answer:
    """The site's answer: an account, or the reason why there is none."""

    account: Account | None
    reason: str = ""


def decide(subject: Subject, account: Account | None) -> Answer:
    """Return the answer about ``subject``, for whom the policy has named ``account`` or none."""
    if account is None:
        return Answer(None, f"the site gives {subject.dn} no account: see the log of its mapping service (lcmaps)")
    if account.uid < LOWEST_UID:
        return Answer(None, f"the policy maps {subject.dn} to {account.name}, a system account: correct its mapfiles")
    return Answer(account)


def may_ask(asker: str, hosts: Iterable[str]) -> bool:
    """Tell whether the DN ``asker``, as the TLS server has verified it, is one of the site's ``hosts`` (DNs)."""
    return bool(asker) and asker in hosts
