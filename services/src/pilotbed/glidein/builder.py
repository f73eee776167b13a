"""Builds the web stage area that pilots fetch their files from, in the format of glideinWMS 3.10.

Command: ``pilotbed-stage --config FILE.toml --out DIR``. Prints ``unchanged``, or ``changed: N new, M removed``. That
is for a frontend; a factory has its own command over the same builder, pilotbed.factory.area, as what its pilots are
told follows from its entries. The configuration (everything not marked optional is required)::

    kind = "frontend"
    web = "http://frontend.grid.test/frontend/stage"   # URL of DIR
    keep_days = 30                  # optional: how long files stay that no list names any more (queued pilots!)
    [attrs]                         # optional: attributes of every group
    GLIDEIN_Glexec_Use = "REQUIRED" # string: S (quoted in the machine ad)
    [groups.main.attrs]             # one table for each group; `[groups.main]` alone is enough
    GLIDEIN_Max_Idle = 300          # integer: I
    GLIDEIN_Ignore_X509_Duration = true                       # boolean: C
    GLIDECLIENT_Group_Start = {expr = "RequestMemory < 2000"} # ClassAd expression: C
    [pool]                          # the user pool: whom the pilot's daemons trust, NAME = end-entity DN
    domain = "grid.test"            # UID_DOMAIN: an identity is NAME@domain
    [pool.central]                  # may negotiate
    central = "/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=central.grid.test"
    [pool.submit]                   # may claim
    submit = "/DC=test/DC=grid/O=Gridlab/OU=Hosts/CN=submit.grid.test"
    [pool.pilots]                   # the pilot itself
    pilot = "/DC=test/DC=grid/O=Gridlab/OU=Services/CN=pilot"

Attributes that pilots understand: docs/glidein.md. Any area (top level, an entry, a group) may add files::

    [[files]]                       # or [[groups.main.files]]
    name = "check_software.sh"      # its name on the worker
    source = "/etc/pilotbed/check_software.sh"
    type = "exec"                   # optional: regular (default), nocache, exec, untar, wrapper, config:c
    list = "file_list"              # optional: file_list (default), after_file_list, preentry_file_list ...
    period = 300                    # optional: a script is run again after so many seconds, again and again; 0: once
    condition = "TRUE"              # optional: TRUE (default), or a variable of the pilot that must be 1
    output = "FALSE"                # optional: a variable that receives the file's path
    directory = ""                  # untar: directory it is unpacked to

``DIR/manifest.json`` is written last and says what to hand to a pilot::

    {"web": URL, "signtype": "sha256", "main": {"descript": FILE, "sign": SHA256 of the signature file},
     "entries": {NAME: {"descript": FILE, "sign": SHA256}}}        # "groups" for a frontend

An entry's files are below ``web/entry_NAME``, a group's below ``web/group_NAME``.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotbed import dn
from pilotbed.relay.zipapp import agent_zipapp

#: The scripts that this package brings for the worker.
SCRIPTS = Path(__file__).parent / "files"
SIGNTYPE = "sha256"
DAY = 86400

#: Lists of an area in the description file. The pilot runs them in its own order (docs/glidein.md).
LISTS = (
    "file_list", "at_file_list", "precvmfs_file_list", "after_file_list", "preentry_file_list",
    "aftergroup_preentry_file_list", "aftergroup_file_list",
)  # fmt: skip
TYPES = ("regular", "nocache", "exec", "untar", "wrapper", "config:c")

#: What a pilot runs of HTCondor: path below /usr on a Debian host -> path in the tarball.
CONDOR = {
    "sbin/condor_master": "sbin/condor_master",
    "sbin/condor_startd": "sbin/condor_startd",
    "sbin/condor_starter": "sbin/condor_starter",
    "sbin/condor_procd": "sbin/condor_procd",
    "libexec/condor/condor_shared_port": "libexec/condor_shared_port",
    "libexec/condor/condor_chirp": "libexec/condor_chirp",
    "libexec/condor/condor_gpu_discovery": "libexec/condor_gpu_discovery",  # without it the startd does not start
    "libexec/condor/condor_ssh_to_job_sshd_setup": "libexec/condor_ssh_to_job_sshd_setup",
    "libexec/condor/condor_ssh_to_job_shell_setup": "libexec/condor_ssh_to_job_shell_setup",
    "lib/condor/condor_ssh_to_job_sshd_config_template": "lib/condor_ssh_to_job_sshd_config_template",
}
#: Shared libraries of every Debian system (apt and dpkg need them): taken from the worker, as its security updates are.
NODE_LIBRARIES = frozenset({
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6",
    "libcrypto.so.3", "libssl.so.3", "libz.so.1", "libzstd.so.1",
})  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLATFORM = re.compile(r"\*|[A-Za-z0-9_.-]+")


class StageError(Exception):
    """The stage area cannot be made; the message names the file or key, the value and the remedy."""


# --- what an area consists of (no I/O) -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Staged:
    """One file of an area as its list names it.

    Args:
        name: its name on the worker.
        content: its bytes.
        type: one of ``TYPES``.
        list: one of ``LISTS``.
        condition: ``TRUE``, or the pilot's variable that must be 1 for the file to be fetched.
        output: ``FALSE``, or the pilot's variable that receives the path.
        period: seconds after which a script is run again, again and again; 0 for once.
    """

    name: str
    content: bytes
    type: str = "regular"
    list: str = "file_list"
    condition: str = "TRUE"
    output: str = "FALSE"
    period: int = 0

    def line(self) -> str:
        """Return the file's line: target, real name, type, period (0: once), prefix, condition, output."""
        return "\t".join([
            self.name, stamped(self.name, self.content), self.type, str(self.period), "GLIDEIN_PS_", self.condition,
            self.output,
        ])  # fmt: skip


@dataclass(frozen=True)
class Area:
    """A rendered area: what lies in its directory, and what a pilot must be told about it."""

    files: Mapping[str, bytes]
    descript: str
    sign: str

    def manifest(self) -> dict[str, str]:
        """Return the area's part of the manifest."""
        return {"descript": self.descript, "sign": self.sign}


@dataclass(frozen=True)
class Attribute:
    """An attribute of an area, as the pilot knows it: its text and HTCondor's type of it (S, I or C)."""

    text: str
    type: str

    @classmethod
    def of(cls, name: str, value: object) -> Attribute:
        """Return the attribute that a TOML value means.

        Raises:
            StageError: the name or the value cannot be an attribute.
        """
        if not _VARIABLE.fullmatch(name):
            raise StageError(f"attribute {name!r}: use letters, digits and underscores")
        match value:
            case bool():
                found = cls(str(value), "C")
            case int():
                found = cls(str(value), "I")
            case str():
                found = cls(value, "S")
            case {"expr": str(expression), **rest} if not rest:
                found = cls(expression, "C")
            case _:
                raise StageError(f'attribute {name}: {value!r} is not a string, number, boolean or {{expr = "..."}}')
        if not found.text.isprintable():
            raise StageError(f"attribute {name}: {value!r} has a line break or another control character")
        return found


def stamped(name: str, content: bytes) -> str:
    """Return the stage's name of a file: what it contains is part of it, so that no cache can serve an old one.

    >>> stamped("a.sh", b"")
    'a.e3b0c44298fc.sh'
    """
    stem, dot, suffix = name.partition(".")
    return f"{stem}.{hashlib.sha256(content).hexdigest()[:12]}{dot}{suffix}"


def attribute_files(
    attributes: Mapping[str, Attribute], known: Iterable[str], list_: str = "file_list"
) -> list[Staged]:
    """Return the files that hand an area's attributes to the pilot.

    Args:
        attributes: by name.
        known: names that the standard list of condor variables describes already; all others are published in the
            machine ad as they are.
        list_: the list they are fetched with.
    """
    constants = "".join(f"{name}\t{attribute.text}\n" for name, attribute in sorted(attributes.items()))
    known = frozenset(known)
    variables = "".join(
        f"{name}\t{attribute.type}\t-\t+\tN\tY\t-\n"
        for name, attribute in sorted(attributes.items())
        if name not in known
    )
    return [
        Staged("constants.cfg", constants.encode(), list=list_, output="CONSTS_FILE"),
        Staged("condor_vars.lst", variables.encode(), list=list_, output="CONDOR_VARS_FILE"),
        script("cat_consts.sh", "exec", list=list_),
    ]


def pool_files(pool: Mapping[str, Any], list_: str) -> list[Staged]:
    """Return the files that tell the pilot's daemons whom to trust: a map file and the lists of who may do what.

    Raises:
        StageError: ``pool`` (see the module's configuration) is not complete.
    """
    check_keys("pool", pool, required={"domain", "central", "submit", "pilots"})
    names: dict[str, list[str]] = {}
    lines = []
    for role in ("central", "submit", "pilots"):
        people = pool[role]
        if not isinstance(people, dict) or not people:
            raise StageError(f'pool.{role}: {people!r} is not a table of NAME = "DN"')
        for name, text in people.items():
            if not _NAME.fullmatch(name) or not isinstance(text, str):
                raise StageError(f"pool.{role}: {name} = {text!r} is not a name and an end-entity DN in slash form")
            try:
                dn.parse(text)
            except dn.NotADn as error:
                raise StageError(f"pool.{role}: {name} = {error}") from None
            line = f"SSL {dn.mapfile(text)} {name}"
            if line not in lines:
                lines.append(line)
        names[role] = [f"{name}@{pool['domain']}" for name in people]
    # The pilot's own account is added on the worker: its daemons talk to each other through the file system (FS).
    everyone = ", ".join(dict.fromkeys([*names["central"], *names["submit"], *names["pilots"], "$(GLIDEIN_Self)"]))
    config = (
        f"UID_DOMAIN = {pool['domain']}\n"
        f"ALLOW_READ = {everyone}\n"
        f"ALLOW_WRITE = {everyone}\n"
        f"ALLOW_DAEMON = {everyone}\n"
        f"ALLOW_NEGOTIATOR = {', '.join(names['central'])}\n"
    )
    return [
        Staged("pool.mapfile", "".join(f"{line}\n" for line in lines).encode(), list=list_, output="X509_CONDORMAP"),
        Staged("50-pool.conf", config.encode(), "config:c", list=list_),
    ]


def render(files: Iterable[Staged], extra: Mapping[str, str] | None = None, loose: Iterable[Staged] = ()) -> Area:
    """Return the area that consists of ``files``.

    Args:
        files: in the order in which the pilot shall fetch them.
        extra: further lines of the description file, name -> value.
        loose: files that no list names, only ``extra``.

    Raises:
        StageError: two files have one name on the worker, or a name, type or list is not possible.
    """
    files = list(files)
    content: dict[str, bytes] = {}
    lists: dict[str, list[str]] = {}
    seen: set[str] = set()
    for file in files:
        check_staged(file)
        if file.name in seen:
            raise StageError(f"two files are called {file.name} on the worker: rename one of them")
        seen.add(file.name)
        content[stamped(file.name, file.content)] = file.content
        lists.setdefault(file.list, []).append(file.line())
    for file in loose:
        content[stamped(file.name, file.content)] = file.content
    lines = []
    for list_, entries in lists.items():
        body = "\n".join(["# target\treal\ttype\tperiod\tprefix\tcondition\toutput", *entries, ""]).encode()
        real = stamped(f"{list_}.lst", body)
        content[real] = body
        lines.append(f"{list_}\t{real}")
    lines += [f"{key}\t{value}" for key, value in (extra or {}).items()]
    # The signature file covers the description, which names the signature file: both carry the stamp of all the rest.
    stamp = hashlib.sha256("\n".join([*sorted(content), *lines]).encode()).hexdigest()[:12]
    signature, descript = f"signature.{stamp}.{SIGNTYPE}", f"description.{stamp}.cfg"
    content[descript] = "\n".join([f"signature\t{signature}", *lines, ""]).encode()
    signed = "".join(f"{hashlib.sha256(content[name]).hexdigest()}  {name}\n" for name in sorted(content)).encode()
    content[signature] = signed
    return Area(content, descript, hashlib.sha256(signed).hexdigest())


def check_staged(file: Staged) -> None:
    """Refuse what the pilot would refuse, or could not read.

    Raises:
        StageError: a name, type, list, condition or output is not possible.
    """
    for what, value, fine in (
        ("name", file.name, _NAME.fullmatch(file.name)),
        ("type", file.type, file.type in TYPES),
        ("list", file.list, file.list in LISTS),
        ("period", file.period, type(file.period) is int and 0 <= file.period < 10**7
         and (not file.period or file.type == "exec")),
        ("condition", file.condition, _VARIABLE.fullmatch(file.condition)),
        ("output", file.output, _VARIABLE.fullmatch(file.output)),
    ):
        if not fine:
            raise StageError(f"file {file.name}: {what} {value!r} is not possible")


def check_keys(where: str, table: object, required: Iterable[str] = (), optional: Iterable[str] = ()) -> None:
    """Raise StageError unless ``table`` is a table with the ``required`` keys and no others than the ``optional``."""
    if not isinstance(table, dict):
        raise StageError(f"{where}: {table!r} is not a table")
    required = set(required)
    if missing := sorted(required - set(table)):
        raise StageError(f"{where}: {', '.join(missing)} is missing")
    if unknown := sorted(set(table) - required - set(optional)):
        raise StageError(f"{where}: unknown key {', '.join(unknown)}")


# --- the areas of a factory and of a frontend ----------------------------------------------------------------------


def script(name: str, type_: str, **more: Any) -> Staged:
    """Return a script of this package as a file of an area (``more``: fields of ``Staged``)."""
    return Staged(name, (SCRIPTS / name).read_bytes(), type_, **more)


def standard_variables() -> set[str]:
    """Return the names in the standard list of condor variables."""
    lines = (SCRIPTS / "condor_vars.lst").read_text().splitlines()
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


@dataclass
class Tree:
    """All areas of one stage: directory ("" for the main area) -> area; and the manifest."""

    areas: dict[str, Area] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)


def build(config: Mapping[str, Any]) -> Tree:
    """Return everything that the stage described by ``config`` consists of.

    Args:
        config: a frontend's as in the module's text; a factory's has ``kind = "factory"``, ``entries`` for ``groups``,
            no ``pool``, and optionally ``condor``: "host" packs the installed condor package; "none"; or a .tar.gz;
            and ``tarballs`` for other platforms, as in `platform_files`.

    Raises:
        StageError: the configuration is wrong, or something that it names cannot be read.
    """
    kind = config.get("kind")
    if kind not in ("factory", "frontend"):
        raise StageError(f'kind: {kind!r} is neither "factory" nor "frontend"')
    factory = kind == "factory"
    part = "entries" if factory else "groups"
    required = {"kind", "web", part} if factory else {"kind", "web", part, "pool"}
    optional = {"keep_days", "attrs", "files"} | ({"condor", "tarballs"} if factory else set())
    check_keys("configuration", config, required, optional)
    if not re.fullmatch(r"https?://[^\s]+[^\s/]", str(config["web"])):
        raise StageError(f"web: {config['web']!r} is not a URL without a final slash")
    known = standard_variables()
    own = {name: Attribute.of(name, value) for name, value in config.get("attrs", {}).items()}
    tree = Tree()
    if factory:
        files, loose, extra = factory_main(own, known, str(config.get("condor", "host")), config.get("tarballs", ()))
        tree.areas[""] = render([*files, *extra_files(config, "configuration")], extra, loose)
    else:
        # The frontend's attributes come before the entry's: where both say something, the site has the last word.
        files = [*attribute_files(own, known, "preentry_file_list"), *pool_files(config["pool"], "preentry_file_list")]
        tree.areas[""] = render([*files, *extra_files(config, "configuration")])
    tree.manifest = {"web": config["web"], "signtype": SIGNTYPE, "main": tree.areas[""].manifest(), part: {}}
    check_keys(part, config[part], optional=config[part])
    for name, table in sorted(config[part].items()):
        where = f"{part}.{name}"
        if not _NAME.fullmatch(name):
            raise StageError(f"{where}: use letters, digits, dot, dash and underscore")
        check_keys(where, table, optional={"attrs", "files"})
        attributes = {key: Attribute.of(key, value) for key, value in table.get("attrs", {}).items()}
        list_ = "file_list" if factory else "preentry_file_list"
        area = render([*attribute_files(attributes, known, list_), *extra_files(table, where)])
        tree.areas[("entry_" if factory else "group_") + name] = area
        tree.manifest[part][name] = area.manifest()
    return tree


def function_files() -> list[Staged]:
    """Return what scripts source, under the variables by which glideinWMS's own find it."""
    names = ("get_id_selectors", "b64uuencode", "logging_utils", "glidein_paths")
    return [script(f"{name}.source", "regular", output=f"{name.upper()}_SOURCE") for name in names]


def platform_files(condor: str, tarballs: Iterable[Mapping[str, Any]]) -> list[Staged]:
    """Return HTCondor for each platform, and what chooses one on the node.

    Args:
        condor: what nodes of no other platform get, as in `build`.
        tarballs: ``file``, and the ``os`` and ``arch`` that it is for, ``*`` for any; the first one that fits is taken.

    Raises:
        StageError: a table is wrong, or a file cannot be read.
    """
    platforms: list[tuple[str, str, bytes]] = []
    for at, table in enumerate(tarballs):
        where = f"tarballs[{at}]"
        check_keys(where, table, {"file", "os", "arch"})
        for key in ("os", "arch"):
            if not (isinstance(table[key], str) and _PLATFORM.fullmatch(table[key])):
                raise StageError(f'{where}: {key} {table[key]!r} is not a word such as "debian13" or "aarch64", or "*"')
        platforms.append((table["os"], table["arch"], read(Path(str(table["file"])), where)))
    if condor == "host":
        platforms.append(("*", os.uname().machine, host_condor()))
    elif condor != "none":
        platforms.append(("*", "*", read(Path(condor), "condor")))
    if not platforms:
        return []
    names = [f"condor_{at}" for at in range(len(platforms))]
    named = list(zip(names, platforms, strict=True))
    known = "".join(f"{name.upper()} {system} {arch}\n" for name, (system, arch, _) in named)
    directories = "".join(f"{name}.tar.gz\tcondor\n" for name in names)
    return [
        Staged("condor_platforms.lst", known.encode(), list="after_file_list", output="CONDOR_PLATFORMS"),
        script("condor_platform.sh", "exec", list="after_file_list"),
        Staged("untar.cfg", directories.encode(), list="after_file_list", output="UNTAR_CFG_FILE"),
        *(
            Staged(f"{name}.tar.gz", content, "untar", "after_file_list", condition=name.upper(), output="CONDOR_DIR")
            for name, (_, _, content) in named
        ),
    ]


def factory_main(
    attributes: Mapping[str, Attribute], known: set[str], condor: str, tarballs: Iterable[Mapping[str, Any]] = ()
) -> tuple[list[Staged], list[Staged], dict[str, str]]:
    """Return the main area of a factory: its files, the file that no list names, the description's further lines.

    The node is looked at before the big files are fetched; what needs the frontend's wishes (glexec, traversal)
    comes after the frontend's own files.
    """
    startup = script("condor_startup.sh", "exec")
    files = [
        script("error_gen.sh", "regular", output="ERROR_GEN_PATH"),
        *function_files(),
        *attribute_files(attributes, known),
        script("validate_node.sh", "exec"),
        script("drain.sh", "exec", period=60),
        script("check_proxy.sh", "exec"),
        script("send_logs.sh", "exec"),
    ]
    standard = (SCRIPTS / "condor_vars.lst").read_bytes()
    files = [
        Staged(file.name, standard + file.content, output=file.output) if file.name == "condor_vars.lst" else file
        for file in files
    ]
    files += [
        script("glexec_setup.sh", "exec", list="after_file_list"),
        script("black_hole.sh", "exec", list="after_file_list", period=60),
        script("periodic.sh", "regular", list="after_file_list", output="PERIODIC_SCRIPT"),
        script("job_wrapper.sh", "wrapper", list="after_file_list", condition="GLEXEC_JOB_WRAPPER"),
    ]
    files += [
        *platform_files(condor, tarballs),
        Staged("relay_agent.pyz", agent_zipapp(), list="after_file_list", output="RELAY_AGENT"),
        script("traversal_setup.sh", "exec", list="after_file_list"),
    ]
    return files, [startup], {"last_script": stamped(startup.name, startup.content)}


def extra_files(table: Mapping[str, Any], where: str) -> list[Staged]:
    """Return the files that a configuration adds to an area.

    Raises:
        StageError: a file's table is wrong or its source cannot be read.
    """
    found: list[Staged] = []
    directories = []
    for file in table.get("files", []):
        check_keys(f"{where}.files", file, {"name", "source"},
                   {"type", "list", "period", "condition", "output", "directory"})  # fmt: skip
        fields = {key: value for key, value in file.items() if key not in ("source", "directory")}
        staged = Staged(content=read(Path(file["source"]), f"{where}.files"), **fields)
        if staged.type == "untar":
            if not _NAME.fullmatch(file.get("directory", "")):
                raise StageError(f"{where}.files: {staged.name} needs the directory that it is unpacked to")
            directories.append(f"{staged.name}\t{file['directory']}\n")
        found.append(staged)
    if directories:
        # A factory's own untar.cfg would collide with this one: its extra tarballs belong into an entry.
        list_ = next(file.list for file in found if file.type == "untar")
        found.insert(0, Staged("untar.cfg", "".join(directories).encode(), list=list_, output="UNTAR_CFG_FILE"))
    return found


def read(path: Path, key: str) -> bytes:
    """Return a file's bytes; raise StageError, naming the configuration key, if that is not possible."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StageError(f"{key}: {error}") from error


# --- what is packed from this host ---------------------------------------------------------------------------------


def host_condor(root: Path = Path("/usr")) -> bytes:
    """Return a .tar.gz of the HTCondor installed below ``root`` with the libraries that a plain worker lacks.

    Equal installations give equal bytes.

    Raises:
        StageError: HTCondor is not installed there or lacks a library.
    """
    members: dict[str, Path] = {}
    for source, target in CONDOR.items():
        path = root / source
        if not path.is_file():
            raise StageError(f'{path} is missing: install Debian\'s package condor, or set condor = "none"')
        members[target] = path
        with path.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                continue
        done = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            soname, _, rest = line.strip().partition(" => ")
            if rest.startswith("not found"):
                raise StageError(f"{path} needs {soname}, which this host lacks")
            if rest and Path(soname).name not in NODE_LIBRARIES:
                members[f"lib/{soname}"] = Path(rest.rsplit(" (", 1)[0])
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for target in sorted(members):
            content = members[target].read_bytes()
            member = tarfile.TarInfo(target)
            member.size, member.mode, member.mtime = len(content), 0o755, 0
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(plain.getvalue(), compresslevel=6, mtime=0)


# --- the directory -------------------------------------------------------------------------------------------------


def publish(tree: Tree, out: Path, keep: float, now: float) -> tuple[int, int]:
    """Make ``out`` hold ``tree``; the manifest is replaced last, so that it never names what is not there.

    Args:
        tree: what ``build`` returned.
        out: directory, made if it is missing.
        keep: seconds that a file stays after the last list that named it has gone.
        now: seconds since the epoch.

    Returns:
        How many files are new (or were mended), and how many were removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = 0
        for directory, area in tree.areas.items():
            (out / directory).mkdir(exist_ok=True)
            for name, content in area.files.items():
                new += write(out / directory / name, content)
        new += write(out / "manifest.json", (json.dumps(tree.manifest, indent=1, sort_keys=True) + "\n").encode())
        return new, retire(tree, out, keep, now)


def write(path: Path, content: bytes) -> int:
    """Give ``path`` that content in one step. Returns 1, or 0 if it has it already."""
    if path.is_file() and path.read_bytes() == content:
        return 0
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.chmod(0o644)
    partial.replace(path)
    return 1


def retire(tree: Tree, out: Path, keep: float, now: float) -> int:
    """Remove the files that nothing has named for ``keep`` seconds; returns how many.

    When a file was last named cannot be told from the file (nothing rewrites it), so that ``.retired.json`` notes it.
    """
    named = {str(Path(directory, name)) for directory, area in tree.areas.items() for name in area.files}
    notes = out / ".retired.json"
    since: dict[str, float] = json.loads(notes.read_text()) if notes.is_file() else {}
    there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")}
    idle = {name: since.get(name, now) for name in sorted(there - named - {"manifest.json"})}
    gone = [name for name, when in idle.items() if now - when >= keep]
    for name in gone:
        (out / name).unlink()
        del idle[name]
    for directory in [path for path in out.iterdir() if path.is_dir() and path.name not in tree.areas]:
        if not any(directory.iterdir()):
            directory.rmdir()
    write(notes, (json.dumps(idle, indent=1) + "\n").encode())
    return len(gone)


def command(prog: str, config: Path, out: Path, read_config: Callable[[Path], Mapping[str, Any]]) -> int:
    """Build in ``out`` what ``config`` describes and print what changed; return the exit code.

    Args:
        prog: the command's name, for messages.
        config: the configuration file.
        out: directory that the web server shows.
        read_config: returns what ``build`` takes.
    """
    os.umask(0o022)
    try:
        settings = read_config(config)
        days = settings.get("keep_days", 30)
        if not isinstance(days, int | float) or days < 0:
            raise StageError(f"keep_days: {days!r} is not a number of days")
        new, removed = publish(build(settings), out, days * DAY, time.time())
    except (StageError, OSError) as error:
        print(f"{prog}: {config}: {error}", file=sys.stderr)
        return 1
    print(f"changed: {new} new, {removed} removed" if new or removed else "unchanged")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``pilotbed-stage``."""
    parser = argparse.ArgumentParser(
        prog="pilotbed-stage", description="Build the web stage area that a frontend's pilots fetch from."
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.toml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory that the web server shows")
    options = parser.parse_args(arguments)

    def read_config(path: Path) -> Mapping[str, Any]:
        try:
            found = tomllib.loads(read(path, "--config").decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise StageError(str(error)) from error
        if found.get("kind") == "factory":
            raise StageError("a factory's stage is made of its factory.toml, by pilotbed-factory-stage")
        return found

    return command(parser.prog, options.config, options.out, read_config)


if __name__ == "__main__":
    sys.exit(main())
