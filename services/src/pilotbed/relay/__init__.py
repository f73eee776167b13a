"""The relay: dedicated public ports for daemons behind firewalls, in the manner of GCB, for those who may have one.

Three programs: `server` (pilotbed-relay), `agent` (pilotbed-relay-agent, beside the daemon) and `border`
(pilotbed-border, on the router of a sealed site). docs/relay.md says what passes between them.
"""
