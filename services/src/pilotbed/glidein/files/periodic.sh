#!/bin/bash
# periodic.sh CONFIG LIST: runs what of the list is due (`PERIOD PREFIX AREA SCRIPT` in each line), and says for the machine
# ad what has failed. HTCondor's startd calls it (STARTD_CRON) as often as the shortest period says.
#   GLIDEIN_PS_OK                   whether every script passed at its last run; START heeds it
#   PREFIXOK, PREFIXFAILED_LIST     those of a list's prefix
#   PREFIXLAST, PREFIXLAST_END      the last one, and when it ended
export glidein_config=$1
unset LD_LIBRARY_PATH # HTCondor's own libraries are not for programs of the node
declare -A ok=() failed=() last=() ended=()
all=True
while read -r period prefix area script; do
    name=${script##*/} state=$script.state
    read -r begun status 2>/dev/null <"$state" || begun=0 status=0
    now=$(date +%s)
    # The startd comes a little early, too.
    if ((now - begun >= period - 1)); then
        # One that hangs has failed. What it says is of use while somebody looks for the reason.
        (cd "${2%/*}/tmp" && exec timeout --kill-after 5 "$((period > 60 ? period : 60))" "$script" "$1" "$area") \
            </dev/null >"$script.log" 2>&1
        status=$?
        printf '%s %s\n' "$now" "$status" >"$state"
        last[$prefix]=$name ended[$prefix]=$(date +%s)
    fi
    ok[$prefix]=${ok[$prefix]-True}
    if [[ $status != 0 ]]; then
        all=False ok[$prefix]=False
        failed[$prefix]+=${failed[$prefix]:+,}$name
    fi
done <"$2"
ok[GLIDEIN_PS_]=$all
for prefix in "${!ok[@]}"; do
    printf '%sOK = %s\n%sFAILED_LIST = "%s"\n' "$prefix" "${ok[$prefix]}" "$prefix" "${failed[$prefix]-}"
    [[ -z ${last[$prefix]-} ]] || printf '%sLAST = "%s"\n%sLAST_END = %s\n' \
        "$prefix" "${last[$prefix]}" "$prefix" "${ended[$prefix]}"
done
printf -- '-\n'
