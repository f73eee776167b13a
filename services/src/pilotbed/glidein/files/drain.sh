#!/bin/bash
# Is this node, or the job's place on it, going to be taken away? As machine and job features say (HSF-TN-2016-02):
#   $MACHINEFEATURES/shutdowntime, $JOBFEATURES/shutdowntime_job    Unix seconds; directories, or web addresses
# Sets GLIDEIN_Node_Ends, by which the pilot is over. Fails where less than GLIDEIN_Min_Retire (600) is left of it: no pilot
# starts, and one that runs takes no more jobs (this is a periodic script).
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"

feature() {
    case $1 in
    /*/*) [[ ! -r $1 ]] || head -c 100 "$1" ;;
    http://* | https://*) curl -q --silent --fail --max-time 10 --noproxy '*' "$1" | head -c 100 ;;
    esac
}
wanted=$(gconfig_get GLIDEIN_Min_Retire) now=$(date +%s) ends=''
for time in "$(feature "${MACHINEFEATURES-}/shutdowntime")" "$(feature "${JOBFEATURES-}/shutdowntime_job")"; do
    # A file that says something else says nothing.
    [[ $time =~ ^[[:space:]]*([1-9][0-9]{8,11})[[:space:]]*$ ]] || continue
    [[ -n $ends && $ends -le ${BASH_REMATCH[1]} ]] || ends=${BASH_REMATCH[1]}
done
if [[ -n $ends ]]; then
    gconfig_add_safe GLIDEIN_Node_Ends "$ends"
    [[ $((ends - now)) -ge ${wanted:-600} ]] || script_error WN_Resource \
        "this node is taken away in $((ends - now)) s, jobs need ${wanted:-600} (machine features)" shutdowntime "$ends"
fi
script_ok
