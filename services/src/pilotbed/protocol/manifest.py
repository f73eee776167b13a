"""References to a stage area: where a pilot fetches its files and by which digest it believes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import ProtocolError


@dataclass(frozen=True)
class Signed:
    """One description file and the digest of the signature file that covers it."""

    descript: str
    sign: str


@dataclass(frozen=True)
class Stage:
    """A stage area: its URL, the main part and the parts of entries (factory) or groups (frontend)."""

    web: str
    signtype: str
    main: Signed
    parts: Mapping[str, Signed]

    def part(self, name: str) -> Signed:
        """Return the part of entry or group ``name``.

        Raises:
            ProtocolError: the stage was built without it.
        """
        try:
            return self.parts[name]
        except KeyError:
            raise ProtocolError(f"the stage has no part for {name}: build it again with pilotbed-stage") from None


def parse_manifest(text: str, parts: str) -> Stage:
    """Read the manifest that pilotbed-stage writes; ``parts`` is ``entries`` or ``groups``.

    Raises:
        ProtocolError: not JSON, or a key is missing.
    """

    def signed(value: Any) -> Signed:
        return Signed(str(value["descript"]), str(value["sign"]))

    try:
        data = json.loads(text)
        return Stage(
            web=str(data["web"]),
            signtype=str(data["signtype"]),
            main=signed(data["main"]),
            parts={str(name): signed(value) for name, value in data[parts].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"stage manifest: {type(error).__name__} {error}") from error
