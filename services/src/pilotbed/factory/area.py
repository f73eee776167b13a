"""pilotbed-factory-stage: builds the stage area of the factory's pilots from factory.toml, as the daemon reads it.

The builder is pilotbed.glidein.builder, which knows of areas and files but not of entries: what an entry is, with all
its defaults, is said once, in ``config``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pilotbed.glidein.builder import command
from pilotbed.settings import SettingsError, load

from .config import Config


def description(config: Config) -> dict[str, Any]:
    """Return what ``pilotbed.glidein.builder.build`` needs to know."""
    stage = config.stage
    return {
        "kind": "factory",
        "web": stage.web,
        "keep_days": stage.keep_days,
        "condor": stage.condor,
        "tarballs": stage.tarballs,
        "attrs": stage.attributes,
        "files": stage.files,
        "entries": {
            name: {"attrs": entry.staged(stage.attributes), "files": entry.files}
            for name, entry in config.entries.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``pilotbed-factory-stage``; the directory is the manifest's unless ``--out`` says otherwise."""
    parser = argparse.ArgumentParser(
        prog="pilotbed-factory-stage", description="Build the web stage area that the factory's pilots fetch from."
    )
    default = Path("/etc/pilotbed/factory.toml")
    parser.add_argument("--config", type=Path, default=default, metavar="FILE.toml")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory that the web server shows")
    options = parser.parse_args(argv)
    try:
        config = load(options.config, Config)
    except SettingsError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return command(parser.prog, options.config, options.out or config.manifest.parent, lambda _: description(config))


if __name__ == "__main__":
    sys.exit(main())
