#!/bin/bash
# Configures HTCondor from what the scripts before it found out, and runs condor_master until the pilot's end.
# Life (seconds), as in glideinWMS:
#   GLIDEIN_Max_Walltime           the queue's limit; the pilot dies UPDATE_INTERVAL + 70 + GLIDEIN_Graceful_Shutdown
#                                  (120) before it; retires (no more jobs) GLIDEIN_Job_Max_Time (129600) before it dies
#   GLIDEIN_Retire_Time (21600)    where there is no such limit
#   GLIDEIN_Min_Retire (600)       a pilot that cannot take jobs for so long does not start
#   GLIDEIN_Ignore_X509_Duration   True: does not die 300 s before its proxy (which the CE renews)
#   GLIDEIN_Max_Idle (1200)        without any job; GLIDEIN_Max_Tail (400) after the last one
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"
# shellcheck source=/dev/null
. "$(gconfig_get LOGGING_UTILS_SOURCE)"
unset -f command_not_found_handle # the stage's scripts', not HTCondor's

shopt -u patsub_replacement 2>/dev/null # bash 5.2: an & in a replacement is not what was found
declare -A seconds=()
for pair in GLIDEIN_Max_Walltime=0 GLIDEIN_Job_Max_Time=129600 GLIDEIN_Min_Retire=600 GLIDEIN_Retire_Time=21600 \
    GLIDEIN_Graceful_Shutdown=120 UPDATE_INTERVAL=30 GLIDEIN_CPUS=1 X509_EXPIRE=0 GLIDEIN_Node_Ends=0; do
    value=$(gconfig_get "${pair%=*}")
    seconds[${pair%=*}]=${value:-${pair#*=}}
    [[ ${seconds[${pair%=*}]} =~ ^[0-9]+$ ]] || script_error Config "${pair%=*}: '$value' is not a number"
done

# lifetimes NOW: sets retire and die, in seconds from NOW
lifetimes() {
    local left=$((seconds[X509_EXPIRE] - $1 - 300))
    if [[ ${seconds[GLIDEIN_Max_Walltime]} -gt 0 ]]; then
        die=$((seconds[GLIDEIN_Max_Walltime] - seconds[UPDATE_INTERVAL] - 70 - seconds[GLIDEIN_Graceful_Shutdown]))
    else
        die=$((seconds[GLIDEIN_Retire_Time] + seconds[GLIDEIN_Job_Max_Time]))
    fi
    if [[ $left -lt $die && $(gconfig_get GLIDEIN_Ignore_X509_Duration) != True ]]; then die=$left; fi
    if [[ ${seconds[GLIDEIN_Node_Ends]} -gt 0 ]]; then
        left=$((seconds[GLIDEIN_Node_Ends] - $1 - seconds[GLIDEIN_Graceful_Shutdown]))
        die=$((left < die ? left : die))
    fi
    [[ $die -ge ${seconds[GLIDEIN_Min_Retire]} ]] || script_error WN_Resource \
        "only $die s to live here, jobs need ${seconds[GLIDEIN_Min_Retire]} (GLIDEIN_Max_Walltime, the proxy's end, the node's)"
    retire=$((die - seconds[GLIDEIN_Job_Max_Time]))
    if [[ $retire -lt ${seconds[GLIDEIN_Min_Retire]} ]]; then retire=${seconds[GLIDEIN_Min_Retire]}; fi
    # Pilots that were started together shall not end together.
    retire=$((retire - RANDOM % (retire / 10 + 1)))
}

# --- what only this node knows ---
local_dir=$(gconfig_get GLIDEIN_LOCAL_DIR) condor=$(gconfig_get CONDOR_DIR) proxy=$(gconfig_get X509_USER_PROXY)
config=$local_dir/condor_config account=$(id -un) name=$(gconfig_get GLIDEIN_Pilot_Name)
[[ -x $condor/sbin/condor_master ]] || script_error Config "the factory's stage has no HTCondor (CONDOR_DIR '$condor')"
# A UNIX socket's path has at most 107 characters; HTCondor adds up to 30 to the directory's.
[[ ${#local_dir} -le 70 ]] || script_error Config "$local_dir is too long a path for HTCondor's sockets: use -dir AUTO"
now=$(date +%s)
lifetimes "$now"
gconfig_add GLIDEIN_ToRetire $((now + retire))
gconfig_add GLIDEIN_ToDie $((now + die))
gconfig_add GLIDEIN_Expire $((now + die))
gconfig_add GLIDEIN_Pilot_Account "$account"
gconfig_add GLIDEIN_Worker "$(uname -n)"
gconfig_add GLIDEIN_Batch_Job "${SLURM_JOB_ID:-${JOB_ID-}}"
if [[ -z $(gconfig_get GLIDEIN_MaxMemMBs) ]]; then
    # The pilot's share of the node's memory is that of its CPUs.
    read -r _ memory _ </proc/meminfo
    cpus=$(nproc)
    share=$((seconds[GLIDEIN_CPUS] < cpus ? seconds[GLIDEIN_CPUS] : cpus))
    gconfig_add GLIDEIN_MaxMemMBs $((memory * share / cpus / 1024))
fi

# One partitionable slot, or one slot for each CPU: none of them may end the pilot while another works.
slots=1 partitionable=True others=''
if [[ $(gconfig_get SLOTS_LAYOUT) == fixed ]]; then
    slots=${seconds[GLIDEIN_CPUS]} partitionable=False
    for ((slot = 1; slot <= slots; slot++)); do others+=" && slot${slot}_State =?= \"Unclaimed\""; done
fi

# Who the pool is. A stage of pilotbed brings pool.mapfile, and who may do what; one of glideinWMS a grid map file, lines
# `"DN" NAME`: collector1, collector2 ... (where the negotiator is), frontend. No schedd: those come with a match's session.
mapfile=$(gconfig_get GLIDECLIENT_X509_CONDORMAP) pool='' central=''
mapping='^"(/[^"[:cntrl:]]*[^"\[:cntrl:]])"[[:space:]]+([A-Za-z0-9_.-]+)$'
if [[ -z $mapfile ]]; then
    mapfile=$local_dir/grid.mapfile
    for area in GLIDECLIENT_ ENTRY_ ''; do
        gridmap=$(gconfig_get "${area}GRIDMAP")
        [[ -n $gridmap ]] || continue
        while read -r line || [[ -n $line ]]; do
            [[ -n $line && $line != \#* ]] || continue
            # In quotes HTCondor takes a backslash for itself, but not before another one or the quote.
            [[ $line =~ $mapping && $line != *\\\\* ]] ||
                script_error VO_Config "${gridmap##*/}: '$line' is not \"DN\" NAME"
            printf 'SSL "%s" %s\n' "${BASH_REMATCH[@]:1:2}"
            pool+=" ${BASH_REMATCH[2]}@\$(UID_DOMAIN)"
            [[ ${BASH_REMATCH[2]} != collector* ]] || central+=" ${BASH_REMATCH[2]}@\$(UID_DOMAIN)"
        done <"$gridmap"
    done >"$mapfile"
    [[ -n $central ]] || script_error VO_Config \
        "the frontend's stage does not say who its pool is (pool.mapfile, or a grid-mapfile with a collector)"
    # The pilot's own daemons; of its chain's names the one before all that proxies add.
    own=$(openssl x509 -noout -subject -nameopt compat -in "$proxy") own=${own#subject=}
    while [[ $own =~ ^(.+)/CN=([0-9]+|proxy|limited\ proxy)$ ]]; do own=${BASH_REMATCH[1]}; done
    printf 'SSL "%s" %s\n' "$own" "$account" >>"$mapfile"
fi
{
    cat "$mapfile"
    # Only this account: a payload's account that comes through the file system is nobody.
    printf 'FS /^%s$/ %s\n' "$account" "$account"
} >"$local_dir/mapfile"

# A pool that asks for a token gets it; the proxy comes first.
tokens='' token_files=''
if [[ -n $(gconfig_get GLIDEIN_CONDOR_TOKEN) ]]; then
    tokens+=', IDTOKENS' token_files+="SEC_TOKEN_DIRECTORY = $local_dir/cred/tokens.d"$'\n'
fi
if [[ -n $(gconfig_get GLIDEIN_SCITOKEN) ]]; then
    tokens+=', SCITOKENS' token_files+="SCITOKENS_FILE = $(gconfig_get GLIDEIN_SCITOKEN)"$'\n'
fi

wrapper=
if [[ -s $(gconfig_get WRAPPER_LIST) ]]; then
    wrapper=$local_dir/user_job_wrapper.sh
    while read -r file; do cat "$file"; done <"$(gconfig_get WRAPPER_LIST)" |
        sed "s|^glexec=.*|glexec=$(gconfig_get GLEXEC_BIN)|" >"$wrapper"
    chmod 755 "$wrapper"
fi
[[ $(gconfig_get GLEXEC_JOB) != True || -n $wrapper ]] || script_error Config "glexec is used without a job wrapper"

# --- HTCondor's configuration ---
mkdir -m 700 "$local_dir/log" "$local_dir/lock" "$local_dir/spool" "$local_dir/sock"
mkdir -m 711 "$local_dir/execute"

# variables LIST: its lines become configuration; the names to publish are collected
declare -A done_variables=()
attributes='' environment=' PATH=/usr/local/bin:/usr/bin:/bin'
variables() {
    local variable type default condor_name required publish user_env value
    [[ -f ${1-} ]] || return 0
    while read -r variable type default condor_name required publish user_env; do
        [[ -z $variable || $variable == \#* || -n ${done_variables[$variable]-} ]] && continue
        done_variables[$variable]=yes
        [[ $condor_name == + ]] && condor_name=$variable
        value=$(gconfig_get "$variable")
        [[ -z $value && $default != - ]] && value=$default
        if [[ -z $value ]]; then
            [[ $required == Y ]] && script_error Config "$variable is not set"
            continue
        fi
        if [[ $user_env != - && $value != *[\'\"]* ]]; then
            [[ $user_env == + ]] && environment+=" $variable='$value'" || environment+=" $condor_name='$value'"
        fi
        if [[ $type == S ]]; then
            value=${value//\\/\\\\}
            value="\"${value//\"/\\\"}\""
        fi
        # A $ of a value is not the beginning of one of HTCondor's macros.
        [[ $type == C ]] || value=${value//\$/\$(DOLLAR)}
        printf '%s = %s\n' "$condor_name" "$value"
        [[ $publish == Y ]] && attributes+=" $condor_name"
    done <"$1"
}

{
    cat <<C
RELEASE_DIR = $condor
BIN = $condor/bin
SBIN = $condor/sbin
LIBEXEC = $condor/libexec
LIB = $condor/lib
LOCAL_DIR = $local_dir
LOG = $local_dir/log
EXECUTE = $local_dir/execute
SPOOL = $local_dir/spool
LOCK = $local_dir/lock
RUN = $local_dir/lock
TMP_DIR = $local_dir/tmp
DAEMON_SOCKET_DIR = $local_dir/sock
PROCD_ADDRESS = $local_dir/lock/procd
LOCAL_CONFIG_FILE =
LOCAL_CONFIG_DIR = $(gconfig_get CONDOR_CONFIG_DIR)
CONDOR_ADMIN =
DAEMON_LIST = MASTER, STARTD
SHARED_PORT = $condor/libexec/condor_shared_port
MASTER_NAME = $name
STARTD_NAME = $name
FILESYSTEM_DOMAIN = \$(FULL_HOSTNAME)
ENABLE_IPV6 = false

USE_SHARED_PORT = true
UPDATE_COLLECTOR_WITH_TCP = true
MASTER_UPDATE_INTERVAL = \$(UPDATE_INTERVAL)
# A collector that comes back must hear of this pilot soon.
STARTER_UPDATE_INTERVAL = 20

SEC_DEFAULT_AUTHENTICATION = REQUIRED
SEC_DEFAULT_INTEGRITY = REQUIRED
SEC_DEFAULT_ENCRYPTION = REQUIRED
SEC_READ_AUTHENTICATION = REQUIRED
SEC_CLIENT_AUTHENTICATION = REQUIRED
SEC_CLIENT_INTEGRITY = REQUIRED
SEC_CLIENT_ENCRYPTION = REQUIRED
SEC_DEFAULT_AUTHENTICATION_METHODS = SSL, FS
SEC_CLIENT_AUTHENTICATION_METHODS = SSL$tokens, FS
${token_files}# As the pool's: who stands still for 20 s is not sent away.
SEC_DEFAULT_AUTHENTICATION_TIMEOUT = 120
SEC_CLIENT_AUTHENTICATION_TIMEOUT = 120
# The negotiator brings shadow and starter together: the schedd needs no way to authenticate to the pilot.
SEC_ENABLE_MATCH_PASSWORD_AUTHENTICATION = true
# Pilot and collector on one address would else be taken for one family ("attempt to open invalid session family").
SEC_USE_FAMILY_SESSION = false
AUTH_SSL_SERVER_CADIR = $(gconfig_get X509_CERT_DIR)
AUTH_SSL_CLIENT_CADIR = $(gconfig_get X509_CERT_DIR)
AUTH_SSL_SERVER_USE_DEFAULT_CAS = false
AUTH_SSL_CLIENT_USE_DEFAULT_CAS = false
AUTH_SSL_CLIENT_CERTFILE = $proxy
AUTH_SSL_CLIENT_KEYFILE = $proxy
AUTH_SSL_SERVER_CERTFILE = $proxy
AUTH_SSL_SERVER_KEYFILE = $proxy
AUTH_SSL_ALLOW_CLIENT_PROXY = true
AUTH_SSL_REQUIRE_CLIENT_CERTIFICATE = true
AUTH_SSL_REQUIRE_CLIENT_MAPPING = true
CERTIFICATE_MAPFILE = $local_dir/mapfile
CERTIFICATE_MAPFILE_ASSUME_HASH_KEYS = true
GLIDEIN_Self = $account@\$(UID_DOMAIN)
ALLOW_ADMINISTRATOR = \$(GLIDEIN_Self)
ALLOW_OWNER = \$(GLIDEIN_Self)
ALLOW_CONFIG =
C
    [[ -z $pool ]] || cat <<C
ALLOW_READ = $pool \$(GLIDEIN_Self)
ALLOW_WRITE = $pool \$(GLIDEIN_Self)
ALLOW_DAEMON = $pool \$(GLIDEIN_Self)
ALLOW_NEGOTIATOR =$central
C
    cat <<C
RunBenchmarks = False
HIBERNATION_PLUGIN =
JAVA =
DOCKER =
SINGULARITY =
ENABLE_URL_TRANSFERS = False
STARTER_ALLOW_RUNAS_OWNER = False
JOB_INHERITS_STARTER_ENVIRONMENT = False
SLOT_TYPE_1 = $((100 / slots))%
SLOT_TYPE_1_PARTITIONABLE = $partitionable
NUM_SLOTS_TYPE_1 = $slots
STARTD_SLOT_ATTRS = State
SUSPEND = False
WANT_SUSPEND = False
PREEMPT = False
KILL = False
# A payload that ignores its end holds the slot no longer than this.
MachineMaxVacateTime = 8
KILLING_TIMEOUT = 6

START = (\$(GLIDEIN_Start)) && (\$(GLIDEIN_Entry_Start)) && (\$(GLIDECLIENT_Start)) && (\$(GLIDECLIENT_Group_Start)) \\
    && (time() < GLIDEIN_ToRetire) && (time() + 60 * (TARGET.MaxWallTimeMins ?: 0) < GLIDEIN_ToDie) && (GLIDEIN_PS_OK =!= False) && (\$(GLIDEIN_Glexec_Start))
GLIDEIN_DIES = (time() > GLIDEIN_ToDie)
GLIDEIN_IDLES = (Activity =?= "Idle" && (State =?= "Unclaimed" || PartitionableSlot =?= True) \\
    && DynamicSlot =!= True && (NumDynamicSlots ?: 0) == 0$others)
GLIDEIN_NO_JOB = ((JobStarts ?: 0) == 0 && time() - GLIDEIN_Pilot_Start > GLIDEIN_Max_Idle)
GLIDEIN_TAIL = ((JobStarts ?: 0) > 0 \\
    && time() - max({EnteredCurrentActivity, NumDynamicSlotsTime ?: 0}) > GLIDEIN_Max_Tail)
STARTD.DAEMON_SHUTDOWN = \$(GLIDEIN_DIES) || (\$(GLIDEIN_IDLES) && \\
    (\$(GLIDEIN_NO_JOB) || \$(GLIDEIN_TAIL) || time() > GLIDEIN_ToRetire))
# Not before a slow node has come to start the startd: until then its start time is 0, too.
MASTER.DAEMON_SHUTDOWN = (STARTD_StartTime =?= 0) && (time() - DaemonStartTime > 30)

IS_GLIDEIN = True
C
    if [[ $(gconfig_get GLEXEC_JOB) == True ]]; then
        # gLExec protects the pilot from the payload, not from what HTCondor does for the job with the pilot's rights:
        # without these lines "transfer_output_files = /path/of/pilot.pem", a file: URL or a user's own transfer plug-in
        # hand out the pilot's proxy, and sshd or a pre-command run under its account (docs/glexec.md).
        cat <<'C'
FILETRANSFER_PLUGINS =
STARTER_DISABLE_USER_SUPPLIED_TRANSFER_PLUGINS = True
STARTER_ALLOW_JOB_PRE_AND_POST_CMD = False
ENABLE_PEEK_JOB = False
ENABLE_SSH_TO_JOB = False
GLIDEIN_Glexec_Start = TARGET.x509userproxysubject =!= undefined && TARGET.JobUniverse == 5 \
    && TARGET.OutputDestination =?= undefined && !regexp("(^|,)[ \t]*[/~]|[.][.]|[$][$]|:", \
    strcat(TARGET.TransferOutput ?: "", ",", TARGET.TransferCheckpoint ?: ""))
C
    else
        printf 'GLIDEIN_Glexec_Start = True\n'
    fi
    if [[ -s $(gconfig_get PERIODIC_LIST) ]]; then
        shortest=$(sort -n "$(gconfig_get PERIODIC_LIST)" | sed 's/ .*//;q')
        cat <<C
STARTD_CRON_JOBLIST = PERIODIC
STARTD_CRON_PERIODIC_EXECUTABLE = $(gconfig_get PERIODIC_SCRIPT)
STARTD_CRON_PERIODIC_ARGS = $glidein_config $(gconfig_get PERIODIC_LIST)
STARTD_CRON_PERIODIC_MODE = Periodic
STARTD_CRON_PERIODIC_PERIOD = ${shortest}s
STARTD_CRON_PERIODIC_PREFIX =
C
    fi
    # One of several collectors that was away is told again after a minute, not after an hour.
    printf 'DEAD_COLLECTOR_MAX_AVOIDANCE_TIME = 60\n'
    [[ -z $wrapper ]] || printf 'USER_JOB_WRAPPER = %s\n' "$wrapper"
    traversal=$(gconfig_get GLIDEIN_Traversal)
    case $traversal in
    ccb*)
        printf 'PRIVATE_NETWORK_NAME = %s\n' "${name##*_}"
        if [[ $traversal == ccb_tunnel ]]; then
            printf 'CCB_ADDRESS = %s\n' "$(gconfig_get GLIDEIN_CCB_Broker)"
            printf 'OUTBOUND_CCB_ADDRESS = %s\n' "$(gconfig_get GLIDEIN_CCB_Broker_Sinful)"
        else
            # shellcheck disable=SC2016
            printf 'CCB_ADDRESS = $(COLLECTOR_HOST)\n'
        fi
        [[ $traversal != ccb ]] || printf 'CCB_CLIENT_STREAMING = False\n'
        ;;
    relay)
        # Its daemons speak to each other on the node: while the relay is away, a starter whose way to the startd leads
        # through it ends its payload ("FAILED TO SEND INITIAL KEEP ALIVE TO OUR PARENT").
        printf 'PRIVATE_NETWORK_NAME = %s\nPRIVATE_NETWORK_INTERFACE = 127.0.0.1\n' "${name##*_}"
        ;;
    esac
    for prefix in '' ENTRY_ GLIDECLIENT_ GLIDECLIENT_GROUP_; do
        variables "$(gconfig_get "${prefix}CONDOR_VARS_FILE")"
    done
    printf 'STARTD_ATTRS = IS_GLIDEIN%s\n' "$attributes"
    printf 'STARTER_JOB_ENVIRONMENT = "%s"\n' "${environment# }"
} >"$config" || exit 1

# --- run ---
master='' stopped=''
on_signal() {
    stopped=yes
    warn "stopping HTCondor"
    # Below a script's & it is ignored until the master has a handler of its own: one is lost that comes before.
    [[ -z $master ]] || while kill -QUIT "$master" && sleep 2; do :; done 2>/dev/null &
}
trap on_signal TERM INT HUP

for variable in ${!_CONDOR_@}; do unset "$variable"; done
# The libraries are for HTCondor's programs only; sudo drops the variable, a payload's environment is made anew.
env -u X509_USER_PROXY CONDOR_CONFIG="$config" LD_LIBRARY_PATH="$condor/lib" "$condor/sbin/condor_master" -f &
master=$!
[[ -z $stopped ]] || on_signal
agent=$(gconfig_get RELAY_AGENT_PID)

# The collectors as /proc/net/tcp writes them: ADDRESS:PORT in hexadecimal, the address in the host's byte order.
collectors=$(
    for each in $(gconfig_get GLIDEIN_Collector | tr ',' ' '); do
        each=${each%%\?*}
        getent ahostsv4 "${each%:*}" | while IFS=' .' read -r a b c d _; do
            printf '%02X%02X%02X%02X:%04X\n' "$d" "$c" "$b" "$a" "${each##*:}"
        done
    done | sort -u
)
# Whether a connection of ours to a collector has been without an acknowledgement for some 15 s (six retransmissions).
collector_lost() {
    awk -v uid="$UID" -v collectors="$collectors" '
        $4 == "01" && $8 == uid && $7 > "00000005" && index(collectors, $3) { found = 1 }
        END { exit !found }' /proc/net/tcp
}
watch() {
    while sleep 5 && kill -0 "$master"; do
        # Without its port the pilot is of no use to anybody.
        [[ -z $agent ]] || kill -0 "$agent" || kill -QUIT "$master"
        # TCP itself waits a quarter of an hour, as it does after a NAT has forgotten its connections, and the pool hears
        # nothing of this pilot meanwhile. Told to reconfigure, master and startd connect anew.
        ! collector_lost || kill -HUP "$master"
        # A starter that was killed: startd has tried to remove its directory before glexec gave that back, and once only.
        for sandbox in "$local_dir"/execute/dir_*; do
            kill -0 "${sandbox##*_}" || rm -rf "$sandbox"
        done
    done 2>/dev/null
}
watch &
while wait "$master"; status=$?; [[ $status -gt 128 ]] && kill -0 "$master" 2>/dev/null; do :; done

for log in "$local_dir"/log/{MasterLog,StartLog,SharedPortLog,StarterLog*} "$local_dir/relay.log"; do
    [[ ! -s $log ]] || glog_write condor_startup.sh file "$log"
done
[[ $status -ne 99 ]] || status=0 # DAEMON_SHUTDOWN came true
if [[ -n $agent && -z $stopped ]] && ! kill -0 "$agent" 2>/dev/null; then
    script_error Network "the relay's agent has ended: $(tail -n 1 "$local_dir/relay.log")"
fi
if [[ $status -eq 0 ]] && ! compgen -G "$local_dir/log/StarterLog.slot*" >/dev/null &&
    grep -q 'aborting command UPDATE_STARTD_AD' "$local_dir/log/StartLog" 2>/dev/null; then
    script_error VO_Proxy "the pool $(gconfig_get GLIDEIN_Collector) did not believe this pilot: $(
        grep -h ' ERROR: ' "$local_dir/log/StartLog" | tail -n 1)"
fi
# The master's comes true, too, where the startd has died.
startd=$(grep -h 'The STARTD (pid [0-9]*) ' "$local_dir/log/MasterLog" 2>/dev/null | tail -n 1)
if [[ $status -ne 0 || ! $startd =~ ^$|' with status '(0|99)( |$) ]]; then
    script_error WN_Resource "condor_master ended with code $status; $startd; $(
        grep -h ' ERROR ' "$local_dir"/log/{MasterLog,StartLog} 2>/dev/null | tail -n 1)"
fi
script_ok jobs "$(cat "$local_dir"/log/StarterLog.slot* 2>/dev/null | grep -c 'Create_Process succeeded')"
