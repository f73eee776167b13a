#!/bin/bash
# Does this node eat jobs: do they fail here as soon as they start, and so draw the next ones? A periodic script.
#   GLIDEIN_BLACKHOLE_NUMJOBS  so many jobs that failed make a black hole (default: it is not looked for, as one user with
#                              broken jobs would close pilots to all others)
#   GLIDEIN_BLACKHOLE_RATE     within as many seconds as that many jobs take at so many a second (default 0.05: 20 s each),
#                              each of them shorter than one at that rate
# Once it has failed it stays so: the pilot runs out and ends.
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"

most=$(gconfig_get GLIDEIN_BLACKHOLE_NUMJOBS) rate=$(gconfig_get GLIDEIN_BLACKHOLE_RATE)
[[ -n $most && $most != 0 ]] || { script_ok && exit 0; }
[[ $most =~ ^[1-9][0-9]{0,4}$ ]] || script_error Config "GLIDEIN_BLACKHOLE_NUMJOBS: '$most' is not a number of jobs"
[[ ${rate:=0.05} =~ ^[0-9]*\.?[0-9]+$ && $rate =~ [1-9] ]] ||
    script_error Config "GLIDEIN_BLACKHOLE_RATE: '$rate' is not a number of jobs a second"

seen=$(gconfig_get GLIDEIN_LOCAL_DIR)/black_hole
if [[ ! -s $seen ]]; then
    # "MM/DD/YY HH:MM:SS ... Create_Process succeeded, pid=N", "... Process exited, pid=N, status=N" (or signal=N)
    failed=$(cat "$(gconfig_get GLIDEIN_LOCAL_DIR)"/log/StarterLog.slot* 2>/dev/null | awk -v rate="$rate" -v most="$most" '
        BEGIN { now = systime() }
        match($0, /pid=[0-9]+/) {
            split($1, day, "/"); split($2, time, ":")
            at = mktime(2000 + day[3] " " day[1] " " day[2] " " time[1] " " time[2] " " int(time[3]))
            job = substr($0, RSTART, RLENGTH)
            if (/Create_Process succeeded/) begun[job] = at
            else if (/Process exited/ && !/status=0$/ && job in begun && now - at <= most / rate &&
                     at - begun[job] < 1 / rate) failed++
        }
        END { print failed + 0 }')
    ((failed < most)) || printf '%s jobs failed within %s s of their start' "$failed" \
        "$(awk -v rate="$rate" 'BEGIN { printf "%d", 1 / rate }')" >"$seen"
fi
[[ ! -s $seen ]] || script_error WN_Resource "this node eats jobs: $(<"$seen")" jobs "$most"
script_ok
