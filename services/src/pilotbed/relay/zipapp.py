"""The agent as one file, for a worker that has Python and nothing of ours."""

import io
import zipfile
from pathlib import Path

#: Of the package pilotbed: the agent, and all that it imports.
FILES = (
    "__init__.py", "relay/__init__.py", "relay/agent.py", "relay/files.py", "relay/log.py", "relay/protocol.py",
    "relay/sockets.py", "relay/streams.py",
)  # fmt: skip

_MAIN = b"import sys\nfrom pilotbed.relay.agent import main\nsys.exit(main())\n"


def agent_zipapp() -> bytes:
    """Return the agent as a zip application that needs nothing but Python's standard library; always the same bytes."""
    package = Path(__file__).parent.parent
    sources = {f"pilotbed/{name}": (package / name).read_bytes() for name in FILES} | {"__main__.py": _MAIN}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(sources.items()):
            archive.writestr(zipfile.ZipInfo(name), content)  # ZipInfo's default date makes equal input equal output
    return out.getvalue()
