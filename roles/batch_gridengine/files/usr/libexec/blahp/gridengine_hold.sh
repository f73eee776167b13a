#!/bin/sh
# As for jobs of blahp's own name for Grid Engine.
exec "${0%/*}/sge_hold.sh" "$@"
