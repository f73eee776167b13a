"""Controller side of config_tree: render a role's tree here, install it on the node in one run."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template

#: The program and its input share standard input: no file is left on the node, nothing shows on a command line.
BOOTSTRAP = """python3 -I -c 'import sys, json; d = json.load(sys.stdin); n = {"__name__": "config_tree"}; \
exec(compile(d["program"], "config_tree", "exec"), n); n["main"](d["wanted"])'"""

OPTIONS = frozenset({"attributes", "items", "trees", "units", "restart"})
PROGRAM = Path(__file__).parent.parent / "modules" / "config_tree.py"

#: The role that installs our package, and where.
PACKAGE_ROLE, PACKAGE_PATH = "pilotbed", "/usr/lib/pilotbed"
#: In a path: the file is there once for each of the task's items.
_OF_ITEM = re.compile(r"{{\s*item\b")
#: What names modules in a unit: ``gunicorn pilotbed.mapping.app:create()``.
_CALLABLE = re.compile(r"\bpilotbed(?:\.\w+)+(?=:)")


def _walk(top):
    """Return the files below ``top``, through symbolic links to directories, without what Python compiled."""
    found = []
    for directory, names, files in os.walk(top, followlinks=True):
        names[:] = [name for name in names if name != "__pycache__"]
        found += [Path(directory, name) for name in files]
    return sorted(found)


class Imports:
    """What a program of ours imports, directly or not: the files that it has to be started anew for.

    Args:
        top: directory that has the package.
    """

    def __init__(self, top):
        self._top = Path(top)

    def of_program(self, text, name):
        """Return the modules that a script in Python names in its import statements; none for any other program."""
        first = text.partition("\n")[0]
        return self._imported(ast.parse(text, name), "") if first.startswith("#!") and "python" in first else set()

    def closure(self, modules):
        """Return, below ``top``, the files of ``modules`` and of all that they import.

        A package of which a module is imported counts with its files that are no modules: a service hands those on, as
        the factory does the pilot's scripts. One that calls ``__import__`` counts whole: it takes modules by name.
        """
        found, waiting = {}, list(modules)
        while waiting:
            module = waiting.pop()
            path = self._path(module)
            if path is None or module in found:
                continue
            found[module] = path
            waiting += [module.rpartition(".")[0]] if "." in module else []
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            tree = ast.parse(path.read_bytes(), str(path))
            waiting += self._imported(tree, package)
            if any(isinstance(node, ast.Name) and node.id == "__import__" for node in ast.walk(tree)):
                waiting += [f"{package}.{other.stem}" for other in path.parent.glob("*.py")]
        files = set(found.values())
        for package in {path.parent for path in files} - {self._path("pilotbed").parent}:
            files.update(path for path in package.rglob("*") if self._is_data(path, package))
        return sorted(str(path.relative_to(self._top)) for path in files)

    def _path(self, module):
        path = self._top.joinpath(*module.split("."))
        candidates = (path / "__init__.py", path.with_suffix(".py"))
        return next((candidate for candidate in candidates if candidate.is_file()), None)

    @staticmethod
    def _is_data(path, package):
        if not path.is_file() or path.suffix in (".py", ".pyc"):
            return False
        below = [parent for parent in path.parents if parent.is_relative_to(package) and parent != package]
        return not any((parent / "__init__.py").exists() for parent in below)

    @staticmethod
    def _imported(tree, package):
        """Return the names of modules, and perhaps of what is in them, that ``tree`` imports anywhere."""
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".") if package else []
                base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                module = ".".join(filter(None, (base, node.module)))
                names.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
        return {name for name in names if name.split(".")[0] == "pilotbed"}


class ActionModule(ActionBase):
    """See ``plugins/modules/config_tree.py`` for the options."""

    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        args = self._task.args
        if unknown := sorted(set(args) - OPTIONS):
            known = ", ".join(sorted(OPTIONS))
            raise AnsibleActionFail(f"config_tree has no option {', '.join(unknown)}; it has {known}")
        role = self._task._role
        if role is None:
            raise AnsibleActionFail("config_tree installs the tree of a role: use it in a role's tasks")
        own = Path(role._role_path)
        files, of_items = {}, []
        for tree in [*(own.parent / name for name in args.get("trees") or []), own]:
            found, theirs = self._tree(tree, task_vars, args.get("items") or [])
            files.update(found)
            of_items += theirs
        attributes = args.get("attributes") or {}
        if strangers := sorted(set(attributes) - set(files)):
            raise AnsibleActionFail(f"{own.name}: attributes of files that are not in the tree: {', '.join(strangers)}")
        for path, entry in files.items():
            entry.update({key: str(value) for key, value in attributes.get(path, {}).items()})
        wanted = {
            "files": files,
            "units": list(args.get("units") or []),
            "task": f"{own.name}: {self._task.name}",
            "of_items": of_items,
            "restart": bool(args.get("restart", False)),
            "programs": self._programs(own.parent, files, args.get("units") or []),
            "check": self._task.check_mode,
            "diff": self._task.diff,
        }
        payload = json.dumps({"program": PROGRAM.read_text(), "wanted": wanted}).encode()
        done = self._low_level_execute_command(BOOTSTRAP, in_data=payload)
        try:
            result.update(json.loads(done["stdout"]))
        except ValueError:
            raise AnsibleActionFail(f"config_tree on the node: {done['stderr'] or done['stdout']}") from None
        return result

    @staticmethod
    def _programs(roles, files, units):
        """Return, for each unit that runs a program of ours, the files of our package that it imports, on the node."""
        package = roles / PACKAGE_ROLE / "files"
        imports = Imports(f"{package}{PACKAGE_PATH}")
        found = {}
        for unit in units:
            template = re.sub(r"@[^@]*(?=\.)", "@", unit)  # of an instance
            places = [f"{top}/systemd/system/{template}" for top in ("/etc", "/usr/lib")]
            text = next((base64.b64decode(files[place]["content"]).decode() for place in places
                         if files.get(place, {}).get("content")), "")  # fmt: skip
            modules = set(_CALLABLE.findall(text))
            for path in re.findall(r"^ExecStart(?:Pre|Post)?=[-+!@:]*(/\S+)", text, re.MULTILINE):
                if path in files:
                    modules |= imports.of_program(base64.b64decode(files[path]["content"]).decode(), path)
                elif (program := Path(f"{package}{path}")).is_file():
                    modules |= imports.of_program(program.read_text(), path)
            if modules:
                found[unit] = [f"{PACKAGE_PATH}/{path}" for path in imports.closure(modules)]
        return found

    def _tree(self, role, task_vars, items):
        """Return {path on the node: entry} of the tree of the role in ``role``, and which of the paths items have."""
        if not role.is_dir():
            raise AnsibleActionFail(f"config_tree: there is no role {role.name} beside {self._task._role}")
        found, of_items = {}, []
        for kind in ("files", "templates"):
            top = role / kind
            for source in _walk(top):
                name = "/" + str(source.relative_to(top))
                for item in items if _OF_ITEM.search(name) else [None]:
                    given = task_vars if item is None else {**task_vars, "item": item}
                    path, entry = self._rendered(role, source, name, kind, given)
                    found[path] = entry
                    if item is not None:
                        of_items.append(path)
        return found, of_items

    def _rendered(self, role, source, name, kind, task_vars):
        """Return where a file of a tree lands, and its entry."""
        templar = self._templar.copy_with_new_env(searchpath=[str(role / "templates")], available_variables=task_vars)
        if "{{" in name:
            name = templar.template(trust_as_template(name))
        content = source.read_bytes()
        if kind == "templates":
            name = name.removesuffix(".j2")
            try:
                text = templar.template(
                    trust_as_template(content.decode()),
                    escape_backslashes=False,
                    overrides={"trim_blocks": True, "lstrip_blocks": True},
                )
            except Exception as error:
                raise AnsibleActionFail(f"{source}: {error}") from error
            text = "" if text is None else str(text)
            # Jinja drops the file's last newline.
            content = f"{text.rstrip()}\n".encode() if text.strip() else None
        return name, {
            "content": None if content is None else base64.b64encode(content).decode(),
            "owner": "root",
            "group": "root",
            "mode": "0755" if source.stat().st_mode & 0o100 else "0644",
        }
