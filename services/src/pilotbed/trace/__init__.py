"""pilotbed-trace: who ran on this node at this time, and where did this user run.

The records are glexec's (`pilotbed.glexec.record`), one a payload, from systemd's journal. ``records`` joins them with
those of the batch system and of HTCondor, without I/O; ``cli`` reads them.
"""
