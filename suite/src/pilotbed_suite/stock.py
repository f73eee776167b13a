"""A stage area as a stock frontend of glideinWMS 3.10 makes it: its documented format, our own words.

What is different from ours: SHA-1; comments in every file, signatures too; a list of nodes without a digest; scripts
that source the pilot's functions and go on where one is missing; who the pool is as lines of a grid map file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LISTS = ("preentry_file_list", "file_list", "aftergroup_preentry_file_list", "aftergroup_file_list")

#: Every stock script begins so.
_SOURCE = """#!/bin/bash
glidein_config="$1"
add_config_line_source=$(grep -m1 '^ADD_CONFIG_LINE_SOURCE ' "$glidein_config" | cut -d ' ' -f 2-)
. "$add_config_line_source"
error_gen=$(gconfig_get ERROR_GEN_PATH "$glidein_config")
get_id_selectors_source=$(gconfig_get GET_ID_SELECTORS_SOURCE "$glidein_config")
. "$get_id_selectors_source"
prefix=$(get_prefix "$2")
"""

CAT_CONSTS = _SOURCE + """constants="$(gconfig_get "${prefix}CONSTS_FILE" "$glidein_config")"
if [ -n "$constants" ]; then
    echo "# constants of $2" >>"$glidein_config"
    grep -v '^#' "$constants" | while read -r line; do
        gconfig_add $line
    done
fi
"$error_gen" -ok cat_consts.sh
exit 0
"""

CHECK_BLACKLIST = _SOURCE + """blacklist=$(gconfig_get "${prefix}BLACKLIST_FILE" "$glidein_config")
name=$(uname -n)
if [ -n "$blacklist" ] && grep -q "^'${name//./\\\\.}'" "$blacklist"; then
    "$error_gen" -error check_blacklist.sh WN_Resource "This node '$name' is in the blacklist." hostname "$name"
    exit 1
fi
address=$(host "$name" | awk '{print $4}')
"$error_gen" -ok check_blacklist.sh
exit 0
"""


@dataclass(frozen=True)
class File:
    """One file of an area, as a frontend's configuration adds it.

    Args:
        name: its name on the worker.
        content: its text.
        type: regular, nocache (which has no digest), exec, wrapper, untar or config:c.
        list: one of ``LISTS``.
        period: seconds between two runs of an ``exec``; 0: once.
        condition: TRUE, or the variable that must be 1.
        output: FALSE, or the variable that receives the path.
        prefix: what the attributes of a periodic one begin with.
    """

    name: str
    content: str
    type: str = "regular"
    list: str = "file_list"
    period: int = 0
    condition: str = "TRUE"
    output: str = "FALSE"
    prefix: str = "GLIDEIN_PS_"

    def real(self, stamp: str) -> str:
        """Return its name in the stage."""
        if self.type == "nocache":
            return self.name
        stem, dot, suffix = self.name.rpartition(".")
        return f"{stem}.{stamp}.{suffix}" if dot else f"{self.name}.{stamp}"

    def line(self, stamp: str) -> str:
        """Return its line of a list."""
        columns = self.name, self.real(stamp), self.type, str(self.period), self.prefix, self.condition, self.output
        return " \t".join(columns)


def _header(name: str, *more: str) -> str:
    return "".join(f"# {line}\n" for line in (f"File: {name}", "", *more))


def _digest(content: str) -> str:
    return hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()  # glideinWMS knows no other


def write_area(
    root: Path, constants: dict[str, str], files: Sequence[File] = (), blacklist: Sequence[str] = (), gridmap: str = ""
) -> tuple[str, str]:
    """Write an area of a frontend, its main one or a group's.

    Args:
        root: the directory that is served.
        constants: attributes.
        files: what the frontend's configuration adds.
        blacklist: host names that take no pilot.
        gridmap: lines ``"DN" name``; main areas only.

    Returns:
        The description file's name, and the SHA-1 of the signature file: what a pilot is told.
    """
    early = "preentry_file_list"
    described = _header("constants.cfg") + "".join(f"{name} \t{value}\n" for name, value in constants.items())
    variables = _header("condor_vars.lst", "VarName Type Default CondorName Req. Export UserName") + "#" * 80 + "\n"
    variables += "".join(f"{name} \tS \t- \t+ \t\tN \tY \t-\n" for name in constants if not name.endswith("_Start"))
    everything = [
        File("constants.cfg", described, list=early, output="CONSTS_FILE"),
        File("condor_vars.lst", variables, list=early, output="CONDOR_VARS_FILE"),
        File("untar.cfg", _header("untar.cfg"), list=early, output="UNTAR_CFG_FILE"),
        *([File("grid-mapfile", gridmap, list=early, output="GRIDMAP")] if gridmap else []),
        File("nodes.blacklist", "# nodes that take no pilot\n" + "".join(f"'{name}'\n" for name in blacklist),
             "nocache", early, output="BLACKLIST_FILE"),
        File("cat_consts.sh", CAT_CONSTS, "exec", early),
        File("check_blacklist.sh", CHECK_BLACKLIST, "exec", early),
        File("setup_prejob.sh", "# sourced before each job\n", list=early),
        *files,
    ]  # fmt: skip
    # glideinWMS's changes whenever a stage is made: what a web cache has kept is never another file.
    stamp = _digest(repr((constants, everything)))[:6]
    staged = {file.real(stamp): file.content for file in everything}
    description = {"signature": f"signature.{stamp}.sha1"}
    for name in LISTS:
        real = description[name] = f"{name}.{stamp}.lst"
        heads = "Outfile \tInFile \tCache/exec \tPeriod \tPrefix \tCondition \tConfigOut"
        lines = "".join(f"{file.line(stamp)}\n" for file in everything if file.list == name)
        staged[real] = _header(real, heads) + "#" * 78 + f"\n{lines}"
    descript = f"description.{stamp}.cfg"
    staged[descript] = _header(descript) + "".join(f"{name} \t{value}\n" for name, value in description.items())
    unsigned = {file.real(stamp) for file in everything if file.type == "nocache"}
    signature = _header(description["signature"]) + "".join(
        f"{_digest(content)}  {name}\n"
        for name, content in staged.items() if name not in unsigned
    )  # fmt: skip
    staged[description["signature"]] = signature
    root.mkdir(parents=True, exist_ok=True)
    for name, content in staged.items():
        (root / name).write_text(content)
    return descript, _digest(signature)
