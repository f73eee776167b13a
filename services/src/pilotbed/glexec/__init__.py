"""glexec: runs a payload under its own user's pool account, with the command line and the exit codes of gLExec.

Who runs as whom: ``front`` is the caller (a pilot account); ``root`` is root, reached through one sudoers rule, and
parses nothing that the caller controls; ``mapper`` is the account ``glexec`` while it reads the proxy; the payload is
the user's account. ``policy`` holds every decision that needs no I/O.
"""
