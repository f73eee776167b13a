"""The submit description of pilots: pure text, so that every character of it can be tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pilotbed.glidein.arguments import pilot_arguments
from pilotbed.pool.text import quote
from pilotbed.protocol.ads import FactoryName
from pilotbed.protocol.manifest import Stage

from . import gridtypes
from .config import Entry
from .trust import Trusted

#: Seconds that a pilot may be late beyond its queue's limit before the schedd removes it.
GRACE = 12 * 3600


@dataclass(frozen=True)
class Submission:
    """What all pilots of a factory have in common: its name, its schedd, the start-up script and its verbosity."""

    factory: FactoryName
    schedd: str
    executable: Path
    verbosity: str

    def arguments(self, entry: Entry, trusted: Trusted, stage: Stage) -> list[str]:
        """Return the start-up script's arguments.

        Raises:
            ProtocolError: the factory's stage has no part for the entry.
            ValueError: a parameter cannot be coded.
        """
        request = trusted.request
        part = stage.part(request.entry_short)
        options = {
            "v": self.verbosity,
            "factory": self.factory.factory,
            "name": self.factory.glidein,
            "entry": request.entry_short,
            "clientname": str(request.client),
            "clientgroup": request.client.group,
            "schedd": self.schedd,
            "cluster": "$(Cluster)",
            "subcluster": "$(Process)",
            "submitcredid": trusted.credential.credential,
            "proxy": entry.proxy,
            "dir": entry.work_dir,
            "web": stage.web,
            "signtype": stage.signtype,
            "sign": stage.main.sign,
            "descript": stage.main.descript,
            "signentry": part.sign,
            "descriptentry": part.descript,
            "clientweb": request.stage.web,
            "clientsigntype": request.stage.signtype,
            "clientsign": request.stage.main.sign,
            "clientdescript": request.stage.main.descript,
            "clientwebgroup": request.stage.group_web,
            "clientsigngroup": request.stage.group.sign,
            "clientdescriptgroup": request.stage.group.descript,
        }
        if not entry.proxy:
            del options["proxy"]
        return pilot_arguments(options, sorted(trusted.parameters.items()))

    def description(
        self, entry: Entry, trusted: Trusted, words: list[str], credential: Path, ends: float, logs: Path,
        files: Sequence[Path] = (),
    ) -> str:
        """Return the submit description of pilots for ``trusted`` with the argument list ``words``.

        ``logs`` is the directory of the pilots' output; ``credential`` the proxy file that they run under, which is
        good until ``ends`` (seconds, Unix); ``files`` come to the pilot's start directory.
        """
        request = trusted.request
        name = trusted.outputs
        marks = {
            "GlideinFactory": self.factory.factory,
            "GlideinName": self.factory.glidein,
            "GlideinEntryName": request.entry_short,
            "GlideinClient": str(request.client),
            "GlideinFrontendName": trusted.security,
            "GlideinCredentialIdentifier": trusted.credential.credential,
            "GlideinSecurityClass": trusted.credential.security_class,
            "GlideinWebBase": request.stage.web,
        }
        longest = entry.max_walltime + GRACE
        too_long = f"(JobStatus == 2 && time() - EnteredCurrentStatus > {longest})"
        if request.idle_lifetime:
            # Not since it was queued (QDate): a pilot that ran for hours, was held while its CE could not be reached,
            # and is released, is idle until the CE is asked for it. It may well run.
            too_long += f" || (JobStatus == 1 && time() - EnteredCurrentStatus > {request.idle_lifetime})"
        lines = {
            "universe": "grid",
            **gridtypes.load(entry.gridtype).description(entry.gatekeeper, entry.queue),
            "executable": self.executable,
            "arguments": '"' + " ".join(words) + '"',
            # Without it HTCondor tells A-REX 128 MB (25.14), and a batch system that limits memory ends the pilot.
            "request_memory": entry.memory,
            "x509userproxy": credential,
            "output": logs / f"{name}.$(Cluster).$(Process).out",
            "error": logs / f"{name}.$(Cluster).$(Process).err",
            "log": logs / f"{name}.log",
            "should_transfer_files": "yes",
            "when_to_transfer_output": "on_exit",
            "notification": "never",
            "periodic_remove": too_long,
            "MY.GlideinProxyEnds": int(ends),
            **({"transfer_input_files": ", ".join(map(str, files))} if files else {}),
        } | {f"MY.{key}": quote(value) for key, value in marks.items()}
        return "".join(f"{key} = {value}\n" for key, value in lines.items())
