#!/bin/bash
# How the schedd reaches this pilot. GLIDEIN_Traversal lists the ways that are allowed, the best one first:
#   direct         the worker can be reached from outside
#   ccb            connections are reversed by the pool's collector, which moves no bytes: one side has to be reachable
#   ccb_streaming  the same, and the collector moves the bytes where neither side is
#   ccb_tunnel     a collector at the site's border (GLIDEIN_CCB_Broker, HOST:PORT) also opens the pilot's connections
#   relay          a dedicated port of the relay with the least to do: GLIDEIN_Relay_Server (HOST:PORT ...), within
#                  GLIDEIN_Relay_Timeout (60) s, for clients of GLIDEIN_Relay_Sources (NETWORK ...; everybody)
# The pilot ends if none works. Sets GLIDEIN_Traversal to the way that was found.
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"

# keep_running COMMAND...: start it again when it was killed (by the kernel, short of memory, say); end with it otherwise
keep_running() {
    local child status=137
    trap 'kill "$child"; wait "$child"; exit' TERM
    while [[ $status -gt 128 ]]; do
        "$@" &
        child=$!
        wait "$child"
        status=$?
        [[ $status -le 128 ]] || sleep 1
    done
    exit "$status"
}

# relay: start the agent and wait for its port; otherwise problem says why not
relay() {
    local agent status host port state log timeout deadline server servers source sources options=()
    state=$(gconfig_get GLIDEIN_LOCAL_DIR)/relay.json log=$(gconfig_get GLIDEIN_LOCAL_DIR)/relay.log
    timeout=$(gconfig_get GLIDEIN_Relay_Timeout)
    timeout=${timeout:-60}
    deadline=$((SECONDS + timeout))
    IFS=', ' read -ra servers <<<"$(gconfig_get GLIDEIN_Relay_Server)"
    IFS=', ' read -ra sources <<<"$(gconfig_get GLIDEIN_Relay_Sources)"
    problem='GLIDEIN_Relay_Server is not set'
    [[ ${#servers[@]} -gt 0 ]] || return
    for server in "${servers[@]}"; do options+=(--server "$server"); done
    for source in "${sources[@]}"; do options+=(--allow "$source"); done
    rm -f "$state"
    options+=(--proxy "$(gconfig_get X509_USER_PROXY)" --cadir "$(gconfig_get X509_CERT_DIR)" --state "$state"
        --pilot "$(gconfig_get GLIDEIN_Pilot_Name)")
    keep_running /usr/bin/python3 -I "$(gconfig_get RELAY_AGENT)" "${options[@]}" </dev/null >"$log" 2>&1 &
    agent=$!
    while [[ ! -s $state ]]; do
        if ! kill -0 "$agent" 2>/dev/null; then
            wait "$agent"
            status=$?
            problem="no relay of ${servers[*]} gave a port (agent's code $status): $(tail -n 1 "$log")"
            return
        fi
        if [[ $SECONDS -ge $deadline ]]; then
            kill "$agent"
            problem="no relay of ${servers[*]} gave a port within $timeout s: $(tail -n 1 "$log")"
            return
        fi
        sleep 0.2
    done
    read -r host port < <(/usr/bin/python3 -I -c \
        'import json, sys; state = json.load(open(sys.argv[1])); print(state["host"], int(state["port"]))' "$state")
    if [[ -z ${port-} ]]; then
        kill "$agent"
        problem="the relay's agent wrote no address to $state"
        return
    fi
    # The port is the same on both sides: HTCondor advertises its own port at the forwarding host.
    gconfig_add TCP_FORWARDING_HOST "$host"
    gconfig_add SHARED_PORT_PORT "$port"
    gconfig_add GLIDEIN_Relay_Address "$host:$port"
    gconfig_add RELAY_AGENT_PID "$agent"
    problem=''
}

# broker: HTCondor takes the broker as a sinful string only ("failed to connect to outbound CCB HOST:PORT"), and checks
# the name in its certificate by the alias
broker() {
    local server address
    server=$(gconfig_get GLIDEIN_CCB_Broker)
    problem='GLIDEIN_CCB_Broker is not set to HOST:PORT'
    [[ $server =~ ^[A-Za-z0-9.-]+:[0-9]+$ ]] || return
    read -r address _ < <(getent ahostsv4 "${server%:*}")
    problem="the broker's name ${server%:*} has no address here"
    [[ -n $address ]] || return
    gconfig_add GLIDEIN_CCB_Broker_Sinful "<$address:${server##*:}?alias=${server%:*}&noUDP&sock=collector>"
    problem=''
}

ways=$(gconfig_get GLIDEIN_Traversal) problems=''
IFS=', ' read -ra ways <<<"${ways:-direct}"
for way in "${ways[@]}"; do
    problem=''
    case $way in
    direct) ;;
    ccb | ccb_streaming) ;;
    ccb_tunnel) broker ;;
    relay) relay ;;
    *) script_error Config "GLIDEIN_Traversal: '$way' is none of direct, ccb, ccb_streaming, ccb_tunnel, relay" ;;
    esac
    if [[ -z $problem ]]; then
        gconfig_add GLIDEIN_Traversal "$way"
        [[ -z $problems ]] || warn "traversal by $way: ${problems%; }"
        script_ok traversal "$way"
        exit 0
    fi
    problems+="$problem; "
done
script_error Network "no way for connections to this pilot: ${problems%; }"
