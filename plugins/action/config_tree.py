"""Controller side of config_tree: render a role's tree here, install it on the node in one run."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template

#: The program and its input share standard input: no file is left on the node, nothing shows on a command line.
BOOTSTRAP = """python3 -I -c 'import sys, json; d = json.load(sys.stdin); n = {"__name__": "config_tree"}; \
exec(compile(d["program"], "config_tree", "exec"), n); n["main"](d["wanted"])'"""

OPTIONS = frozenset({"attributes", "trees", "units", "restart"})
PROGRAM = Path(__file__).parent.parent / "modules" / "config_tree.py"


def _walk(top):
    """Return the files below ``top``, through symbolic links to directories, without what Python compiled."""
    found = []
    for directory, names, files in os.walk(top, followlinks=True):
        names[:] = [name for name in names if name != "__pycache__"]
        found += [Path(directory, name) for name in files]
    return sorted(found)


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
        files = {}
        for tree in [*(own.parent / name for name in args.get("trees") or []), own]:
            files.update(self._tree(tree, task_vars))
        attributes = args.get("attributes") or {}
        if strangers := sorted(set(attributes) - set(files)):
            raise AnsibleActionFail(f"{own.name}: attributes of files that are not in the tree: {', '.join(strangers)}")
        for path, entry in files.items():
            entry.update({key: str(value) for key, value in attributes.get(path, {}).items()})
        wanted = {
            "files": files,
            "units": list(args.get("units") or []),
            "restart": bool(args.get("restart", False)),
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

    def _tree(self, role, task_vars):
        """Return {path on the node: entry} of the tree of the role in directory ``role``."""
        if not role.is_dir():
            raise AnsibleActionFail(f"config_tree: there is no role {role.name} beside {self._task._role}")
        templar = self._templar.copy_with_new_env(searchpath=[str(role / "templates")], available_variables=task_vars)
        found = {}
        for kind in ("files", "templates"):
            top = role / kind
            for source in _walk(top):
                name = "/" + str(source.relative_to(top))
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
                found[name] = {
                    "content": None if content is None else base64.b64encode(content).decode(),
                    "owner": "root",
                    "group": "root",
                    "mode": "0755" if source.stat().st_mode & 0o100 else "0644",
                }
        return found
