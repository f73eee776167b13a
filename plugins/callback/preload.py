"""Callback plugin: loads what tasks need of Ansible before the first one, once for all.

Ansible forks a process for each task and host. Plugins that are not loaded by then are loaded by each of them: that was
a third of the controller's CPU time.
"""

from __future__ import annotations

DOCUMENTATION = r"""
name: preload
type: aggregate
short_description: loads plugins once instead of once a task and host
description:
  - Loads Jinja's filters and tests, actions and lookups before tasks are forked off.
"""

from ansible.plugins.callback import CallbackBase
from ansible.plugins.loader import action_loader, filter_loader, lookup_loader, test_loader


class CallbackModule(CallbackBase):
    """See the plugin's documentation above."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "preload"
    CALLBACK_NEEDS_ENABLED = True

    def v2_playbook_on_start(self, playbook):
        for loader in (filter_loader, test_loader, action_loader, lookup_loader):
            list(loader.all(class_only=True))
