#!/bin/bash
# Puts an area's attributes (constants.cfg: NAME, tab, VALUE) into the configuration of the pilot.
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"
# shellcheck source=/dev/null
. "$(gconfig_get GET_ID_SELECTORS_SOURCE)"

prefix=$(get_prefix "$2") || script_error Config "unknown area $2"
constants=$(gconfig_get "${prefix}CONSTS_FILE")
while read -r name value; do
    gconfig_add "$name" "$value" || script_error WN_Resource "cannot write $glidein_config"
done <"$constants"
script_ok
