"""Callback plugin: one line a play while it works, everything in a log, and of a failure what it takes to mend it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: layers
type: stdout
short_description: a line a play, with its time and what it waits for
description:
  - The screen shows one line a play; tasks, changes and skips go to the log.
  - With --check or --diff it shows every change, too, and with --diff what it is.
options:
  log:
    description: File that takes every task and its result.
    type: path
    default: var/log/site.log
    env:
      - name: PILOTBED_LOG
"""

import json
import sys
import time
from pathlib import Path

from ansible import context
from ansible.plugins.callback import CallbackBase

WIDTH = 58


class CallbackModule(CallbackBase):
    """See the plugin's documentation above."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "layers"

    def __init__(self):
        super().__init__()
        self._play = None
        self._started = self._task_started = time.monotonic()
        self._first_wait = {}
        self._items = {}
        self._log = None
        self._executions = 0

    def set_options(self, *args, **kwargs):
        super().set_options(*args, **kwargs)
        path = Path(self.get_option("log"))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = path.open("a", buffering=1)

    # -- the screen ----------------------------------------------------------------------------------------------

    def _line(self, text, end="\n"):
        # A terminal shows what is waited for on the play's own line; a file gets whole lines only.
        if sys.stdout.isatty():
            sys.stdout.write(f"\r\033[K{text}{end}")
        elif end:
            sys.stdout.write(f"{text}{end}")
        sys.stdout.flush()

    def _finish(self):
        if self._play is not None:
            self._line(f"  {self._play:<{WIDTH}} {time.monotonic() - self._started:6.1f} s")
            self._play = None

    def v2_playbook_on_play_start(self, play):
        self._finish()
        self._play, self._started = play.get_name(), time.monotonic()
        self._write(f"PLAY {self._play}")
        self._line(f"  {self._play} …", end="")

    def v2_playbook_on_no_hosts_matched(self):
        # A layer that this inventory does without.
        self._line("", end="")
        self._play = None

    def v2_playbook_on_task_start(self, task, is_conditional):
        self._task_started = time.monotonic()
        self._first_wait = {}
        self._items = {}
        self._write(f"TASK {task.get_name()}")

    def v2_playbook_on_handler_task_start(self, task):
        self.v2_playbook_on_task_start(task, False)

    def v2_runner_retry(self, result):
        host = result._host.get_name()
        first = self._first_wait.setdefault(host, time.monotonic())
        waited = time.monotonic() - first
        self._line(f"  {self._play}: {host}: {result._task.get_name().split(' : ')[-1]} … {waited:.0f} s", end="")

    # -- results -------------------------------------------------------------------------------------------------

    def v2_runner_on_ok(self, result):
        self._executions += 1
        self._record("changed" if result.is_changed() else "ok", result)
        if result._task.action in ("debug", "ansible.builtin.debug"):  # a task that is there to be read
            said = result._result.get("msg") or []
            for text in [said] if isinstance(said, str) else said:
                self._line(f"  {result._host.get_name()}: {text}")

        elif result.is_changed() and (context.CLIARGS.get("check") or context.CLIARGS.get("diff")):
            self._show(result)

    def _show(self, result):
        """Say on the screen what a task changed, or would: a config_tree its files and units, any other its name."""
        content = result._result
        what = ", ".join([*content.get("files", ()), *content.get("units", ())]) or result._task.get_name()
        self._line(f"  {result._host.get_name()}: {what}")
        if context.CLIARGS.get("diff") and not result._task.no_log:
            for line in self._get_diff(content.get("diff") or []).splitlines():
                self._line(f"    {line}")

    def v2_runner_on_skipped(self, result):
        self._write(f"  skipped {result._host.get_name()}")

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._executions += 1
        self._record("failed", result)
        if not ignore_errors:
            self._explain("failed", result)

    def v2_runner_item_on_failed(self, result):
        # ansible-core 2.21 keeps the items' results out of the task's.
        self._items.setdefault(result._host.get_name(), []).append(result._result)

    def v2_runner_on_unreachable(self, result):
        self._record("unreachable", result)
        self._explain("cannot be reached", result)

    def _explain(self, what, result):
        content = result._result
        if self._play:
            self._line(f"  {self._play}: {what}")
        # A task that runs once speaks for all hosts, not for the one that happened to run it.
        where = "" if result._task.run_once else f"{result._host.get_name()}: "
        lines = [f"\n{where}{result._task.get_name()}: {what}"]
        hidden = result._task.no_log or content.get("_ansible_no_log")
        # Of a loop, what its items said: the task's own message is "One or more items failed".
        for item in self._items.pop(result._host.get_name(), None) or [content]:
            for key in () if hidden else ("msg", "stderr", "stdout"):
                if text := str(item.get(key) or "").strip():
                    lines.append("\n".join(f"    {line}" for line in text.splitlines()[-30:]))
        lines.append(f"    in {result._task.get_path()}; every task is in {self.get_option('log')}")
        lines.append("    Mend what it says and run the same command again: it goes on from there.")
        print("\n".join(lines), file=sys.stderr)

    def _record(self, outcome, result):
        spent = time.monotonic() - self._task_started
        self._write(f"  {outcome} {result._host.get_name()} {spent:.1f} s")
        if outcome in ("changed", "failed", "unreachable") and not result._task.no_log:
            kept = {key: value for key, value in result._result.items() if not key.startswith("_") and key != "diff"}
            self._write("    " + json.dumps(kept, default=str)[:4000])

    def _write(self, text):
        self._log.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def v2_playbook_on_stats(self, stats):
        self._finish()
        totals = {"hosts": len(stats.processed), "executions": self._executions}
        for name in ("ok", "changed", "failures", "dark", "skipped"):
            totals[name] = sum(getattr(stats, name).values())
        self._write("STATS " + json.dumps(totals))
        if not totals["failures"] and not totals["dark"]:
            self._line(f"  {totals['changed']} changes, {totals['executions']} task runs on {totals['hosts']} nodes")
