#!/bin/sh
# blahpd knows the ending .py of none but its own.
exec "${0%/*}/gridengine_status.py" "$@"
