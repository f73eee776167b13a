"""Which package may import which: no arrow runs upward, no circle stands, the product knows nothing of its tests."""

from __future__ import annotations

import ast
import graphlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pilotbed_suite import CHECKOUT

#: The parts, each with what it may import of the others.
PARTS = {
    "pilotbed": (),
    "pilotbed_suite": ("pilotbed",),
    "pilotbed_lab": ("pilotbed", "pilotbed_suite"),
    "pilotbed_bench": ("pilotbed", "pilotbed_suite", "pilotbed_lab"),
    "pilotbed_training": ("pilotbed", "pilotbed_suite", "pilotbed_lab"),
}
#: The product's rooms from bottom to top; one imports from lower layers only.
LAYERS = (
    ("certificate", "dn", "files", "lean", "settings", "tool"),
    ("service", "watch"),
    ("batch", "lcmaps", "pool", "x509"),
    ("daemon", "gridtools", "protocol", "proxy"),
    ("ca", "logs", "mapping", "relay"),
    ("glexec", "glidein"),
    ("factory", "frontend", "trace"),
    ("why",),
)


def sources() -> dict[str, Path]:
    """Return every module of all parts, by its name."""
    found = {}
    for part in PARTS:
        (top,) = CHECKOUT.glob(f"*/src/{part}")
        for path in top.rglob("*.py"):
            name = path.relative_to(top.parent).with_suffix("").as_posix().replace("/", ".")
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = sources()


def imports(name: str) -> set[str]:
    """Return the modules of ours that a module imports anywhere, also where a function does."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in MODULES else module)
    return {one for one in found if one in MODULES and one != name}


GRAPH = {name: imports(name) for name in MODULES}


def room(name: str) -> str:
    """Return the room of the product that a module is in; "" for its top and for other parts."""
    parts = name.split(".")
    return parts[1] if parts[0] == "pilotbed" and len(parts) > 1 else ""


def test_no_circle_of_imports() -> None:
    assert list(graphlib.TopologicalSorter(GRAPH).static_order())


def test_no_part_imports_one_above_it() -> None:
    wrong = {
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if (top := other.split(".")[0]) != (own := name.split(".")[0]) and top not in PARTS[own]
    }
    assert wrong == set()


def test_every_room_of_the_product_has_its_layer() -> None:
    assert {room(name) for name in MODULES} - {""} == {name for layer in LAYERS for name in layer}


def test_no_room_imports_from_its_own_layer_or_above() -> None:
    height = {name: at for at, layer in enumerate(LAYERS) for name in layer}
    wrong = {
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room(name) and room(other) and room(name) != room(other) and height[room(other)] >= height[room(name)]
    }
    assert wrong == set()


def test_the_rules_can_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the same tests see a circle, an arrow upward, and a product that imports its lab."""
    for name, other, check in (
        ("pilotbed.x509.names", "pilotbed.relay.server", test_no_room_imports_from_its_own_layer_or_above),
        ("pilotbed.relay.server", "pilotbed_lab.nodes", test_no_part_imports_one_above_it),
    ):
        with monkeypatch.context() as broken:
            broken.setitem(GRAPH, name, GRAPH[name] | {other})
            with pytest.raises(AssertionError, match=other):
                check()
    with monkeypatch.context() as broken:
        broken.setitem(GRAPH, "pilotbed.settings", {"pilotbed.factory.config"})
        broken.setitem(GRAPH, "pilotbed.factory.config", {"pilotbed.settings"})
        with pytest.raises(graphlib.CycleError):
            test_no_circle_of_imports()


def test_the_wheel_of_services_holds_the_product_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    copied = shutil.copytree(CHECKOUT / "services", tmp_path / "services", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*command, tmp_path, copied], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"pilotbed"}
    assert "pilotbed/glidein/glidein_startup.sh" in names
    assert not [name for name in names if any(word in name for word in ("lab/", "bench/", "suite/", "tests/", ".pyc"))]
