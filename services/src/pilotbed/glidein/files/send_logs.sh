#!/bin/bash
# Sends the factory what the pilot's logs have grown by, while the pilot runs: of one that is killed nothing else may come.
#   GLIDEIN_Log_Server    https://HOST:PORT of the factory's pilotbed-pilot-log-receiver; without it nothing is sent
#   GLIDEIN_Log_Period    seconds between two looks, 300
# Whatever goes wrong here ends no pilot: a site may let nobody out to there.
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"

server=$(gconfig_get GLIDEIN_Log_Server) period=$(gconfig_get GLIDEIN_Log_Period)
[[ -n $server ]] || { script_ok && exit; }
[[ $server =~ ^https://[A-Za-z0-9.-]+:[0-9]+$ ]] || script_error Config "GLIDEIN_Log_Server '$server' is not https://HOST:PORT"
[[ ${period:=300} =~ ^[1-9][0-9]*$ ]] || script_error Config "GLIDEIN_Log_Period '$period' is no number of seconds"

local_dir=$(gconfig_get GLIDEIN_LOCAL_DIR) pilot=$(gconfig_get GLIDEIN_STARTUP_PID) ca=$(gconfig_get X509_CERT_DIR)
proxy=$(gconfig_get X509_USER_PROXY) part=$local_dir/tmp/part.gz most=500000
job=$(gconfig_get CONDORG_CLUSTER).$(gconfig_get CONDORG_SUBCLUSTER)
where=$server/$(gconfig_get GLIDEIN_Entry_Name)/$job/$(gconfig_get GLIDEIN_Pilot_Name)
[[ -n $proxy && $job =~ ^[0-9]+\.[0-9]+$ ]] || { script_ok && exit; } # started by hand

declare -A sent=() next=()
# send FILE NAME: what is new in it; fails where it is not taken
send() {
    local size from=${sent[$2]:-0}
    size=$(stat --dereference --format %s "$1" 2>/dev/null) || return 0
    [[ $size -ge $from ]] || from=0 # begun anew
    [[ $((size - from)) -le $most ]] || from=$((size - most))
    [[ $size -gt $from ]] || return 0
    tail -c +$((from + 1)) "$1" | head -c $((size - from)) | gzip >"$part" || return 0
    curl -q --silent --fail --globoff --proto '=https' --noproxy '*' --connect-timeout 20 --max-time 60 \
        --capath "$ca" --cert "$proxy" --key "$proxy" --upload-file "$part" "$where/$2/${next[$2]:-0}" || return
    sent[$2]=$size next[$2]=$((${next[$2]:-0} + 1))
}
all() {
    local file
    for file in "$local_dir"/log/{MasterLog,StartLog,SharedPortLog,StarterLog*} "$local_dir/relay.log"; do
        [[ ! -f $file ]] || send "$file" "${file##*/}" || return
    done
    # What the pilot says, where the batch system has it written into files.
    [[ ! -f /proc/$pilot/fd/1 ]] || send "/proc/$pilot/fd/1" out || return
    [[ ! -f /proc/$pilot/fd/2 ]] || send "/proc/$pilot/fd/2" err
}
{
    due=0 failures=0
    # Ten times in a row nothing was taken: it never will be. Short sleeps: this keeps a killed pilot's directory.
    while [[ $failures -lt 10 ]]; do
        if ! kill -0 "$pilot"; then
            all # what it said last
            break
        fi
        if [[ $SECONDS -ge $due ]]; then
            if all; then failures=0; else failures=$((failures + 1)); fi
            due=$((SECONDS + period))
        fi
        sleep 5
    done
    rm -f "$part"
} </dev/null >/dev/null 2>&1 &
script_ok
