"""The factory's store of pilot proxies: one file each, mode 0600, contents never shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pilotbed.files import replace_file
from pilotbed.proxy import Proxy, ProxyError
from pilotbed.service import read_file

from .trust import CredentialName


def better(old: Proxy | None, new: Proxy, now: float) -> str:
    """Return why ``new`` must not replace ``old``; empty if it may.

    A replacement belongs to the same person and lives longer: whoever can send or leave a proxy here may only
    prolong what runs, not exchange whose pilots they are.
    """
    if new.left(now) <= 0:
        return "it has expired"
    if old is not None and new.dn != old.dn:
        return f"it is {new.dn}'s, the stored one {old.dn}'s"
    if old is not None and new.ends <= old.ends:
        return "the stored one lives as long"
    return ""


@dataclass(frozen=True)
class Store:
    """Proxies in ``directory``, one file for each CredentialName."""

    directory: Path

    def path(self, name: CredentialName) -> Path:
        """Return where the proxy of ``name`` is, or would be."""
        return self.directory / name.filename

    def read(self) -> dict[CredentialName, Proxy]:
        """Return what is stored; files that are no proxies are left out."""
        found = {}
        for path in sorted(self.directory.glob("*.pem")):
            name = CredentialName.parse(path.name)
            if name is None:
                continue
            try:
                found[name] = Proxy.read(read_file(path))
            except (ProxyError, OSError):
                continue
        return found

    def keep(self, name: CredentialName, pem: str, now: float) -> tuple[Proxy, str]:
        """Store ``pem`` if it is better than what is there; return it, and why it was not stored (empty if it was).

        Raises:
            ProxyError: ``pem`` is not a proxy.
            OSError: the directory cannot be written.
        """
        new = Proxy.read(pem)
        path = self.path(name)
        try:
            text = read_file(path)
            old = Proxy.read(text)
        except (OSError, ProxyError):  # a file that nobody can use is as good as none
            text, old = "", None
        # The same proxy comes with every turn of the frontend: nothing to say about it.
        why_not = "same" if text == pem else better(old, new, now)
        if not why_not:
            replace_file(path, pem, 0o600)
        return new, why_not
