"""The agent as one file, for a worker that has Python and nothing of ours."""

import io
import zipfile
from pathlib import Path

import pilotbed
from pilotbed import files, relay
from pilotbed.relay import agent, log, protocol, sockets, streams

#: The agent, and all of ours that it imports. Imported here, too: a unit is restarted for what its program imports.
MODULES = (pilotbed, files, relay, agent, log, protocol, sockets, streams)

_MAIN = b"import sys\nfrom pilotbed.relay.agent import main\nsys.exit(main())\n"


def agent_zipapp() -> bytes:
    """Return the agent as a zip application that needs nothing but Python's standard library; always the same bytes."""
    paths = [Path(str(module.__file__)) for module in MODULES]
    top = paths[0].parent.parent
    sources = {str(path.relative_to(top)): path.read_bytes() for path in paths} | {"__main__.py": _MAIN}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(sources.items()):
            archive.writestr(zipfile.ZipInfo(name), content)  # ZipInfo's default date makes equal input equal output
    return out.getvalue()
