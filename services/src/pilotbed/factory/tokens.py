"""Tokens that a frontend has pilots take with them: read, kept until they are sent, never shown."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pilotbed.files import replace_file

#: The kinds, which are the suffixes of their files, too: HTCondor's own, and what WLCG calls SciTokens.
KINDS = ("idtoken", "scitoken")
#: Characters of the longest one.
LONGEST = 16384
#: JSON Web Signature, compact (RFC 7515, 3.1): header, claims, signature.
_FORM = re.compile(r"[A-Za-z0-9_-]+\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+")


class TokenError(Exception):
    """This is no token that could be of use; the message says why, and nothing of it."""


@dataclass(frozen=True)
class Token:
    """A token, unverified: whoever it is shown to checks its signature.

    Args:
        kind: one of ``KINDS``.
        text: as it was issued.
        ends: Unix seconds of its end (``exp``); None where it has none.
    """

    kind: str
    text: str = field(repr=False)
    ends: float | None = None

    @classmethod
    def read(cls, kind: str, text: str) -> Self:
        """Return what ``text`` is.

        Raises:
            TokenError: it is longer than ``LONGEST``, of another form, or its claims cannot be read.
        """
        text = text.strip()
        if len(text) > LONGEST:
            raise TokenError(f"it has {len(text)} characters, {LONGEST} are the most")
        form = _FORM.fullmatch(text)
        if not form:
            raise TokenError("it is not a token: three parts, base64url, joined by dots")
        try:
            claims = json.loads(base64.urlsafe_b64decode(form[1] + "=" * (-len(form[1]) % 4)))
            ends = claims.get("exp")
        except (ValueError, AttributeError, RecursionError):
            raise TokenError("its claims are not a JSON object") from None
        if ends is not None and (isinstance(ends, bool) or not isinstance(ends, int | float)):
            raise TokenError("its exp is not a number")
        return cls(kind, text, ends)

    def expired(self, now: float) -> bool:
        """Return whether it is over at ``now`` (Unix seconds)."""
        return self.ends is not None and self.ends <= now

    def keep(self, directory: Path) -> Path:
        """Write it into ``directory``, from where HTCondor takes it when it stages a pilot in; return the file.

        Raises:
            OSError: the directory cannot be made or written.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / f"pilot.{self.kind}"
        replace_file(path, f"{self.text}\n", 0o600)
        return path
