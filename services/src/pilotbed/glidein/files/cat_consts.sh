#!/bin/bash
# Puts an area's attributes (constants.cfg: NAME, tab, VALUE) into the configuration of the pilot.
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"

case $2 in
main) prefix='' ;;
entry) prefix=ENTRY_ ;;
client) prefix=GLIDECLIENT_ ;;
client_group) prefix=GLIDECLIENT_GROUP_ ;;
*) script_error Config "unknown area $2" ;;
esac
constants=$(gconfig_get "${prefix}CONSTS_FILE")
while read -r name value; do
    gconfig_add "$name" "$value" || script_error WN_Resource "cannot write $glidein_config"
done <"$constants"
script_ok
