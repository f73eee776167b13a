#!/bin/bash
# glidein_startup.sh: a pilot. Fetches the files of its factory, its entry and its frontend, checks every one of them
# against signed digests, runs the scripts among them and at last HTCondor's daemons. Speaks the glideinWMS 3.10
# protocol; stricter in one point: what is not signed is refused. See docs/glidein.md.
#
# Needs bash, coreutils, curl, tar, gzip and openssl.
# shellcheck disable=SC2317,SC2329 # traps, and functions for the scripts, are called where shellcheck does not look

set -u
umask 077
export LC_ALL=C PATH="${PATH:-/usr/bin:/bin}:/usr/sbin:/sbin"
IFS=$' \t\n'
# bash 5.2: an & in the replacement of ${text//a/b} would stand for what was found ("<lt;" for "&lt;").
shopt -u patsub_replacement 2>/dev/null

usage() {
    cat <<'U'
Usage: glidein_startup.sh OPTION VALUE ...
  -factory -name -entry NAME     the factory, its glidein, the entry
  -clientname -clientgroup NAME  the frontend (FRONTEND.GROUP) and its group
  -web -clientweb -clientwebgroup URL               stage areas (the entry's is below the factory's)
  -descript -descriptentry -clientdescript -clientdescriptgroup FILE  their description files
  -sign -signentry -clientsign -clientsigngroup DIGEST  digests of their signature files
  -signtype -clientsigntype sha256|sha1             kind of digest
  -proxy URL|None                                   the site's web cache
  -dir .|Condor|TMPDIR|AUTO|PATH                    where the work directory is made
  -cluster -subcluster -submitcredid -schedd VALUE  the job that brought the pilot here
  -slotslayout partitionable|fixed
  -v std|nodebug|fast|check                         a failed pilot holds the node 1199, 1199, 150, 150 s
  -param_NAME VALUE                                 a parameter, coded (.dot, .colon, ...)
U
}

# --- telling --------------------------------------------------------------------------------------

say() { printf '%s %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*"; }
warn() { printf 'glidein: %s\n' "$*" >&2; }

# xml TEXT: as the content of an element
xml() {
    local text=$1
    text=${text//&/&amp;} text=${text//</&lt;} text=${text//>/&gt;} text=${text//\"/&quot;}
    printf '%s' "$text"
}

# --- the configuration of the pilot: lines "NAME VALUE" -------------------------------------------
# Handed to the scripts as a file to source (ADD_CONFIG_LINE_SOURCE), under the names that glideinWMS gives them.

# gconfig_get NAME [FILE]: the value, or an empty line
gconfig_get() {
    local name value found=
    while read -r name value; do
        if [[ $name == "$1" ]]; then found=$value; fi
    done <"${2:-$glidein_config}"
    printf '%s\n' "$found"
}

# gconfig_add NAME VALUE...
gconfig_add() {
    {
        grep -v "^$1 " "$glidein_config"
        printf '%s\n' "$*"
    } >"$glidein_config.$$.new" && mv -f "$glidein_config.$$.new" "$glidein_config"
}
add_config_line() { gconfig_add "$@"; }

# gconfig_add_safe NAME VALUE...: where several scripts run at a time
gconfig_add_safe() {
    local tries=300 status
    # A link is made or not, on every file system; one that a killed script has left is not waited for any longer.
    until ln -s "$$" "$glidein_config.lock" 2>/dev/null || [[ $((tries -= 1)) -lt 0 ]]; do sleep 0.1; done
    gconfig_add "$@"
    status=$?
    rm -f "$glidein_config.lock"
    return "$status"
}
add_config_line_safe() { gconfig_add_safe "$@"; }

# shellcheck disable=SC2154 # condor_vars_file: set by the script that calls it
# add_condor_vars_line NAME TYPE(I|S|C) DEFAULT CONDORNAME REQUIRED(Y|N) EXPORT(Y|N) USERENV(-|+|@)
add_condor_vars_line() {
    {
        grep -v "^$1[[:space:]]" "$condor_vars_file"
        printf '%s\n' "$*"
    } >"$condor_vars_file.$$.new" && mv -f "$condor_vars_file.$$.new" "$condor_vars_file"
}

# script_ok [METRIC VALUE]...; script_error TYPE TEXT [METRIC VALUE]...: a script's last word
# TYPE: WN_Resource, Network, Config, VO_Config, VO_Proxy, VO_Data or Corruption
script_ok() { "$(gconfig_get ERROR_GEN_PATH)" -ok "${0##*/}" "$@"; }
script_error() {
    "$(gconfig_get ERROR_GEN_PATH)" -error "${0##*/}" "$@"
    exit 1
}

# --- the end --------------------------------------------------------------------------------------

work_dir='' reason='' last_script='' child='' refresher='' stopped='' failure_delay=0 started=$(date +%s)

# finish CODE: leave nothing behind, report, and hold a bad node for a while so that it does not drain the queue
finish() {
    local code=$1 delay=$failure_delay configured result=''
    trap - EXIT
    if [[ -n $work_dir ]]; then
        [[ -n $refresher ]] && kill "$refresher" 2>/dev/null
        configured=$(gconfig_get GLIDEIN_Failure_Delay 2>/dev/null)
        [[ $configured =~ ^[0-9]+$ ]] && delay=$configured
        if [[ -s $work_dir/otrb_output.xml ]]; then result=$(<"$work_dir/otrb_output.xml"); fi
        sweep
        cd "$start_dir" || cd /
        # HTCondor leaves directories without write permission when it is killed.
        chmod -R u+rwX "$work_dir" 2>/dev/null
        rm -rf "$work_dir"
    fi
    report "$code" "$result"
    if [[ $code -ne 0 && -z $stopped && $delay -gt 0 ]]; then
        warn "keeping this node busy for $delay s"
        sleep "$delay" &
        child=$!
        wait "$child" 2>/dev/null
        kill "$child" 2>/dev/null
    fi
    exit "$code"
}

# sweep: end every process that was started on behalf of this pilot, however it got away
sweep() {
    local signal=TERM environ pid left begun=$SECONDS
    # By the clock: on a busy node one that is killed may take seconds to be gone.
    while [[ $((SECONDS - begun)) -lt 20 ]]; do
        left=''
        # One grep for all: one each took minutes on a busy node of a thousand processes.
        while IFS= read -r environ; do
            pid=${environ#/proc/} pid=${pid%/environ}
            [[ $pid == "$$" || $pid == "$BASHPID" ]] && continue
            kill -"$signal" "$pid" 2>/dev/null && left=yes
        done < <(GLIDEIN_WORK_DIR='' grep -lzxF "GLIDEIN_WORK_DIR=$work_dir" /proc/[0-9]*/environ 2>/dev/null)
        [[ -z $left ]] && return
        sleep 0.3
        signal=0
        [[ $((SECONDS - begun)) -lt 3 ]] || signal=KILL
    done
}

# report CODE RESULT: what the factory reads from the pilot's output
report() {
    local code=$1 status=OK
    [[ $code -eq 0 ]] || status=ERROR
    cat <<R
=== Glidein ending $(date) ($(date +%s)) with code $code after $(($(date +%s) - started)) ===

=== XML description of glidein activity ===
<?xml version="1.0"?>
<OSGTestResult id="glidein_startup.sh" version="4.3.1">
  <operatingenvironment>
    <env name="glidein_factory">$(xml "${option[factory]-}")</env>
    <env name="glidein_name">$(xml "${option[name]-}")</env>
    <env name="glidein_entry">$(xml "${option[entry]-}")</env>
    <env name="client_name">$(xml "${option[clientname]-}")</env>
    <env name="client_group">$(xml "${option[clientgroup]-}")</env>
    <env name="condorg_cluster">$(xml "${option[cluster]-}")</env>
    <env name="condorg_subcluster">$(xml "${option[subcluster]-}")</env>
    <env name="condorg_schedd">$(xml "${option[schedd]-}")</env>
    <env name="user">$(id -un)</env>
    <env name="hostname">$(uname -n)</env>
  </operatingenvironment>
  <test>
    <tStart>$(date --date="@$started" +%Y-%m-%dT%H:%M:%S%:z)</tStart>
    <tEnd>$(date +%Y-%m-%dT%H:%M:%S%:z)</tEnd>
  </test>
  <result>
    <status>$status</status>
R
    if [[ $code -ne 0 ]]; then
        printf '    <metric name="TestID">%s</metric>\n' "$(xml "${last_script:-glidein_startup.sh}")"
        sed -n 's/^.*\(<metric name="failure".*\)$/    \1/p' <<<"$2"
        printf '  </result>\n  <detail>\n%s\n  </detail>\n' "$(xml "$reason")"
    else
        sed -n 's/^.*\(<metric name="jobs".*\)$/    \1/p' <<<"$2"
        printf '  </result>\n'
    fi
    printf '</OSGTestResult>\n=== End XML description of glidein activity ===\n'
}

# fail TEXT: the pilot ends here
fail() {
    reason=$*
    warn "$reason"
    finish 1
}

# refuse FILE URL WHY
refuse() { fail "refused: $1 from $2: $3"; }

on_signal() {
    stopped=$1
    warn "signal $1: stopping"
    [[ -n $child ]] && kill -TERM "$child" 2>/dev/null
}

# --- arguments ------------------------------------------------------------------------------------

# shellcheck disable=SC2054
declare -A option=() code=(
    [dot]=. [comma]=, [amp]='&' [backslash]=\\ [pipe]='|' [fork]='`' [quot]='"' [singquot]="'" [eq]== [plus]=+
    [minus]=- [lt]='<' [gt]='>' [open]='(' [close]=')' [gopen]='{' [gclose]='}' [sopen]='[' [sclose]=']'
    [comment]='#' [dollar]='$' [star]='*' [question]='?' [not]='!' [tilde]='~' [colon]=: [semicolon]=';' [nbsp]=' '
)
known=" factory name entry clientname clientgroup web proxy dir sign signtype signentry cluster subcluster submitcredid
 schedd descript descriptentry clientweb clientwebgroup clientsign clientsigntype clientsigngroup clientdescript
 clientdescriptgroup slotslayout v "
known=${known//$'\n'/}

# decode WORD: the value of a parameter
decode() {
    local rest=$1 out='' word
    while [[ $rest == *.* ]]; do
        out+=${rest%%.*} rest=${rest#*.} word=${rest%%,*}
        if [[ $rest == *,* && $word =~ ^[a-z]+$ && -n ${code[$word]-} ]]; then
            out+=${code[$word]} rest=${rest#*,}
        else
            out+=.
        fi
    done
    printf '%s' "$out$rest"
}

parameters=()
read_arguments() {
    local name
    while [[ $# -gt 0 ]]; do
        if [[ $# -lt 2 ]]; then
            usage >&2
            fail "option $1 has no value"
        fi
        name=${1#-}
        [[ $2 == *[[:cntrl:]]* ]] && fail "option $1 has a control character in its value"
        if [[ $1 =~ ^-param_[A-Za-z_][A-Za-z0-9_]*$ ]]; then
            parameters+=("${name#param_}" "$(decode "$2")")
            # A pilot that fails before it has a configuration needs it, too.
            if [[ $name == param_GLIDEIN_Failure_Delay && $2 =~ ^[0-9]+$ ]]; then asked_delay=$2; fi
        elif [[ $1 == -* && $known == *" $name "* ]]; then
            option[$name]=$2
        else
            usage >&2
            fail "unknown option $1"
        fi
        shift 2
    done
    for name in name entry web sign descript signentry descriptentry; do
        if [[ -z ${option[$name]-} ]]; then
            usage >&2
            fail "option -$name is missing"
        fi
    done
}

# --- fetching and checking ------------------------------------------------------------------------

declare -A area_url=() area_dir=() area_sign=() area_type=() area_description=() area_prefix=() digests=()
web_proxy=''
safe_name='^[A-Za-z0-9_][A-Za-z0-9._-]*$'
most_data=1048576

# fetch URL FILE [nocache]: through the site's cache if there is one
fetch() {
    # shellcheck disable=SC2054,SC2191
    local -a how=(-q --silent --show-error --fail --globoff --proto '=http,https' --connect-timeout 20 --max-time 900
        --retry 2 --retry-delay 1 --max-filesize 1000000000 --output "$2")
    local problem status
    [[ ${3-} == nocache ]] && how+=(--header 'Cache-Control: no-cache')
    if [[ -n $web_proxy ]]; then
        problem=$(curl "${how[@]}" --proxy "$web_proxy" "$1" 2>&1)
        status=$?
        # 5, 7: the cache has no address, or nobody answers there. A cache that does answer is not gone around.
        [[ $status -ne 5 && $status -ne 7 ]] && { fetched "$status" "$1" "$problem" && return; }
        warn "web cache $web_proxy does not answer ($problem): fetching directly from now on"
        web_proxy=
    fi
    problem=$(curl "${how[@]}" --noproxy '*' "$1" 2>&1)
    fetched $? "$1" "$problem"
}

fetched() {
    [[ -n $stopped ]] && fail "stopped by signal $stopped"
    [[ $1 -eq 0 ]] || fail "cannot fetch $2: $3"
}

# digest_of TYPE FILE
digest_of() {
    local sum
    sum=$("$1sum" <"$2") && printf '%s' "${sum%% *}"
}

# fetch_checked AREA REAL FILE [nocache]: a file that the area's signature file vouches for
fetch_checked() {
    local id=$1 real=$2 file=$3 url=${area_url[$1]}
    [[ $real =~ $safe_name ]] || refuse "$real" "$url" "not a file name"
    [[ -n ${digests[$id/$real]-} ]] || refuse "$real" "$url" "not signed"
    fetch "$url/$real" "$file.part" "${4-}"
    check "$id" "$real" "$file.part"
    mv -f "$file.part" "$file" || fail "cannot write $file"
}

# fetch_data AREA REAL FILE: what nothing vouches for, and what is never run: a stock frontend's nodes.blacklist, which its
# operator changes without signing the stage anew. Who sits between the pilot and the stage can change it, too.
fetch_data() {
    local real=$2 file=$3 url=${area_url[$1]}
    [[ $real =~ $safe_name ]] || refuse "$real" "$url" "not a file name"
    fetch "$url/$real" "$file.part" nocache
    [[ $(stat -c %s "$file.part") -le $most_data ]] || refuse "$real" "$url" "not signed, and more than $most_data bytes"
    mv -f "$file.part" "$file" || fail "cannot write $file"
    warn "$real ($1) is not signed: taken as data"
}

# check AREA REAL FILE
check() {
    local found
    found=$(digest_of "${area_type[$1]}" "$3")
    [[ $found == "${digests[$1/$2]}" ]] ||
        refuse "$2" "${area_url[$1]}" "digest mismatch (signed ${digests[$1/$2]}, fetched $found)"
}

# description AREA KEY: a value of the area's description file
description() { gconfig_get "$2" "${area_dir[$1]}/${area_description[$1]}"; }

# open_area AREA: fetch its description and its signature file, and believe them only if the digest given on the
# command line is that of the signature file
open_area() {
    local id=$1 url=${area_url[$1]} dir=${area_dir[$1]} type=${area_type[$1]} descript=${area_description[$1]}
    local signature found line length
    case $type in
    sha256) length=64 ;;
    sha1) length=40 ;;
    *) refuse "$descript" "$url" "digests of type '$type' are not supported" ;;
    esac
    [[ $url =~ ^https?://[^[:space:]]+$ ]] || refuse "$descript" "$url" "not a web address"
    [[ $descript =~ $safe_name ]] || refuse "$descript" "$url" "not a file name"
    mkdir -m 711 "$dir" || fail "cannot make $dir"
    fetch "$url/$descript" "$dir/$descript"
    signature=$(description "$id" signature)
    [[ $signature =~ $safe_name ]] || refuse "$descript" "$url" "names no signature file"
    fetch "$url/$signature" "$dir/$signature"
    found=$(digest_of "$type" "$dir/$signature")
    [[ $found == "${area_sign[$id]}" ]] ||
        refuse "$signature" "$url" "digest mismatch (expected ${area_sign[$id]}, fetched $found)"
    while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^[[:space:]]*(#|$) ]] && continue # glideinWMS begins with "# File: ..."
        [[ $line =~ ^([0-9a-f]{$length})\ [\ *]([A-Za-z0-9_][A-Za-z0-9._-]*)$ ]] ||
            refuse "$signature" "$url" "line '$line' is not a digest and a name"
        digests[$id/${BASH_REMATCH[2]}]=${BASH_REMATCH[1]}
    done <"$dir/$signature"
    [[ -n ${digests[$id/$descript]-} ]] || refuse "$descript" "$url" "not signed"
    check "$id" "$descript" "$dir/$descript"
    say "signature of $id OK: $url"
}

# --- running what was fetched ---------------------------------------------------------------------

# run AREA SCRIPT: with the pilot's configuration; its exit code decides
run() {
    local status
    [[ -z $stopped ]] || fail "stopped by signal $stopped before ${2##*/}"
    last_script=${2##*/}
    rm -f "$work_dir/otrb_output.xml" "$work_dir/missing_function"
    say "running $last_script ($1)"
    (
        export -f command_not_found_handle
        exec "$2" "$glidein_config" "$1" </dev/null
    ) &
    child=$!
    # One that came until now had nobody to go on to.
    [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null
    # A trapped signal ends wait early with a code above 128; the script then has its own signal to end by.
    while wait "$child" 2>/dev/null; status=$?; [[ $status -gt 128 ]] && kill -0 "$child" 2>/dev/null; do :; done
    child=
    if [[ -s $work_dir/missing_function ]]; then
        warn "$last_script wants the function $(<"$work_dir/missing_function"), which this pilot does not offer"
        status=127
    elif [[ $status -eq 0 ]] && grep -q '<status>ERROR</status>' "$work_dir/otrb_output.xml" 2>/dev/null; then
        status=1 # it has said that it failed, and ended as if it had not
    fi
    return "$status"
}

# Of bash, in the scripts of the stage. What is no program of this node may have something to fall back to; a function
# of glideinWMS has none: a script that goes on without one has not done what it is there for.
command_not_found_handle() {
    case $1 in
    gconfig_* | add_config_line* | add_condor_vars_line* | get_prefix | get_work_dir | get_descript_file | \
        get_signature | b64uuencode | glog_* | gwms_* | robust_realpath | run_with_timeout | run_wrapper)
        printf '%s\n' "$1" >"$GLIDEIN_WORK_DIR/missing_function"
        kill -KILL $$
        ;;
    esac
    printf '%s: %s: command not found\n' "$0" "$1" >&2
    return 127
}

# must_run AREA SCRIPT
must_run() {
    run "$1" "$2" && return
    local status=$?
    [[ -n $stopped ]] && fail "stopped by signal $stopped in $last_script"
    reason="$last_script ($1) failed with code $status$(detail)"
    # The script has said it itself, if it used script_error.
    [[ -s $work_dir/otrb_output.xml ]] || warn "$reason"
    finish 1
}

# detail: what the last script said about its failure
detail() {
    [[ -s $work_dir/otrb_output.xml ]] || return 0
    printf ': '
    sed -n '/<detail>/,/<\/detail>/{/detail>/d;s/^ *//;s/&lt;/</g;s/&gt;/>/g;s/&quot;/"/g;s/&amp;/\&/g;p}' \
        "$work_dir/otrb_output.xml"
}

# take AREA TARGET REAL TYPE PERIOD PREFIX CONDITION OUTPUT: one line of a list
take() {
    local id=$1 target=$2 real=$3 type=$4 period=$5 prefix=$6 condition=$7 output=$8 file directory
    type=${type/#exec:*/exec} # exec:s: in a container, where the job is in one
    file=${area_dir[$id]}/$target
    [[ $target =~ $safe_name && $target != *.part ]] || refuse "$target" "${area_url[$id]}" "not a file name"
    if [[ $condition != TRUE && $(gconfig_get "$condition") != 1 ]]; then return; fi
    if [[ $target =~ ^gconditional_([A-Za-z0-9]+)_ && $(gconfig_get "GLIDEIN_USE_${BASH_REMATCH[1]}") != 1 ]]; then
        return
    fi
    case $type in
    regular | exec | untar | wrapper | config:c) fetch_checked "$id" "$real" "$file" ;;
    nocache)
        if [[ -n ${digests[$id/$real]-} || $target == *.sh ]]; then
            fetch_checked "$id" "$real" "$file" nocache
        else
            fetch_data "$id" "$real" "$file"
        fi
        ;;
    *) fail "$target ($id): type '$type' is not supported by this pilot" ;;
    esac
    case $type in
    exec | wrapper) chmod 755 "$file" ;;
    *) if [[ $target == *.sh ]]; then chmod 755 "$file"; else chmod 644 "$file"; fi ;;
    esac
    case $type in
    exec)
        must_run "$id" "$file"
        if [[ $period != 0 ]]; then
            [[ $period =~ ^[1-9][0-9]{0,6}$ ]] || fail "$target ($id): '$period' is not a number of seconds"
            [[ $prefix =~ ^[A-Za-z][A-Za-z0-9_]*$ ]] || fail "$target ($id): '$prefix' is not the beginning of a name"
            [[ $prefix != NOPREFIX ]] || prefix=GLIDEIN_PS_
            printf '%s %s %s %s\n' "$period" "$prefix" "$id" "$file" >>"$work_dir/periodic.lst"
        fi
        ;;
    untar)
        directory=$(gconfig_get "$target" "$(gconfig_get "${area_prefix[$id]}UNTAR_CFG_FILE")")
        [[ $directory =~ $safe_name ]] || fail "$target ($id): untar.cfg does not say where it is unpacked to"
        directory=${area_dir[$id]}/$directory
        mkdir -m 755 "$directory" || fail "cannot make $directory"
        tar -xzf "$file" -C "$directory" --no-same-owner --no-same-permissions || fail "cannot unpack $target ($id)"
        chmod -R u+rwX,go=u,go-w "$directory"
        rm -f "$file"
        file=$directory
        ;;
    wrapper) printf '%s\n' "$file" >>"$work_dir/wrapper_list.lst" ;;
    config:c) cp "$file" "$work_dir/condor_config.d/$target" || fail "cannot copy $target ($id)" ;;
    esac
    if [[ $output != FALSE ]]; then gconfig_add "${area_prefix[$id]}$output" "$file"; fi
}

# take_list AREA LIST: everything that a list of the area names, in its order
take_list() {
    local id=$1 real file target name type period prefix condition output
    [[ -n ${area_url[$id]-} ]] || return 0
    real=$(description "$id" "$2")
    [[ -n $real ]] || return 0
    file=${area_dir[$id]}/$2.lst
    fetch_checked "$id" "$real" "$file"
    # On its own descriptor: a script must not be able to eat the list.
    while read -r target name type period prefix condition output <&3; do
        [[ -z $target || $target == \#* ]] && continue
        [[ -n $output ]] || fail "$real ($id): '$target' does not have seven columns"
        take "$id" "$target" "$name" "$type" "$period" "$prefix" "$condition" "$output"
    done 3<"$file"
}

# --- the pilot's place and proxy ------------------------------------------------------------------

# make_work_dir: below what -dir says. The way into it is open to the payload's account, its content only in parts.
make_work_dir() {
    local base=
    case ${option[dir]:-.} in
    .) base=$start_dir ;;
    Condor | CONDOR) base=${_CONDOR_SCRATCH_DIR-} ;;
    TMPDIR) base=${TMPDIR-} ;;
    AUTO)
        for base in "${TMPDIR-}" /var/tmp /tmp "$start_dir"; do
            [[ -n $base && -d $base && -w $base ]] && break
        done
        ;;
    /*) base=${option[dir]} ;;
    *) fail "-dir ${option[dir]} is none of ., Condor, TMPDIR, AUTO or an absolute path" ;;
    esac
    [[ -n $base ]] || fail "-dir ${option[dir]}: the variable that it stands for is not set"
    work_dir=$(mktemp -d "$base/glide_XXXXXX") || { work_dir='' && fail "cannot make a work directory in $base"; }
    chmod 711 "$work_dir"
    mkdir -m 700 "$work_dir/cred" "$work_dir/tmp" "$work_dir/condor_config.d" || fail "cannot write in $work_dir"
    cd "$work_dir" || fail "cannot enter $work_dir"
    # Every process of this pilot carries it: by it they are found at the end.
    export GLIDEIN_WORK_DIR=$work_dir TMPDIR=$work_dir/tmp
    if command -v flock >/dev/null; then
        # As long as this script or one that it has started runs, in whichever container.
        exec {alive}>"$work_dir/.alive" && flock --nonblock "$alive"
        clear_dead "$base"
    fi
}

# clear_dead BASE: what pilots of this account have left that were killed (kill -9, a node short of memory)
clear_dead() {
    local dir
    for dir in "$1"/glide_??????; do
        [[ -O $dir && ! -L $dir && -f $dir/.alive ]] || continue
        # One that was made just now has its lock yet to take.
        [[ -n $(find "$dir/.alive" -mmin +1 2>/dev/null) ]] || continue
        (
            flock --nonblock 9 || exit 0
            chmod -R u+rwX "$dir"
            rm -rf "$dir" && say "removed $dir, which a dead pilot had left"
        ) 9<"$dir/.alive" 2>/dev/null
    done
}

# copy_proxy SOURCE FILE: in one step, and never readable by others
copy_proxy() {
    local partial=$2.new
    rm -f "$partial"
    if [[ -s $1 ]] && cat "$1" >"$partial" 2>/dev/null && ! cmp -s "$partial" "$2"; then
        # A copy taken while the CE writes its file is not a certificate yet; the next round sees the whole one.
        if openssl x509 -noout -checkend 0 -in "$partial" >/dev/null 2>&1 && grep -q 'PRIVATE KEY-----' "$partial"; then
            mv -f "$partial" "$2"
            return
        fi
        [[ -e $2 ]] || mv -f "$partial" "$2" # check_proxy.sh says what is wrong with it
    fi
    rm -f "$partial"
}

# keep_proxy SOURCE FILE: the CE renews its file while the pilot runs
keep_proxy() {
    local interval unknown=10 # it may come with what is not fetched yet
    while kill -0 $$ 2>/dev/null; do
        interval=$(gconfig_get GLIDEIN_Proxy_Refresh)
        [[ $interval =~ ^[1-9][0-9]{0,4}$ ]] || interval=$unknown
        unknown=60
        sleep "$interval"
        copy_proxy "$1" "$2"
    done
}

take_proxy() {
    local source=${X509_USER_PROXY-}
    if [[ -z $source ]]; then
        return # a pilot that needs one says so in check_proxy.sh
    fi
    [[ -r $source ]] || fail "X509_USER_PROXY=$source cannot be read"
    export X509_USER_PROXY=$work_dir/cred/pilot.pem
    copy_proxy "$(readlink -f "$source")" "$X509_USER_PROXY"
    gconfig_add X509_USER_PROXY "$X509_USER_PROXY"
    keep_proxy "$(readlink -f "$source")" "$X509_USER_PROXY" </dev/null >/dev/null 2>&1 &
    refresher=$!
}

# take_tokens: what the frontend sent along for the pool; the copy that came is not left where the job began
take_tokens() {
    local kind token
    for kind in idtoken scitoken; do
        [[ -s $start_dir/pilot.$kind ]] || continue
        token=$work_dir/cred/tokens.d/pilot.$kind
        { mkdir -p "${token%/*}" && cat "$start_dir/pilot.$kind" >"$token"; } || fail "cannot write in $work_dir/cred"
        rm -f "$start_dir/pilot.$kind"
        case $kind in
        idtoken) gconfig_add GLIDEIN_CONDOR_TOKEN "$token" ;;
        scitoken) gconfig_add GLIDEIN_SCITOKEN "$token" ;;
        esac
    done
}

# configure: what the pilot knows before it has fetched anything
configure() {
    local index
    glidein_config=$work_dir/glidein_config
    : >"$glidein_config"
    for ((index = 0; index < ${#parameters[@]}; index += 2)); do
        gconfig_add "${parameters[index]}" "${parameters[index + 1]}"
    done
    declare -f gconfig_get gconfig_add add_config_line gconfig_add_safe add_config_line_safe add_condor_vars_line \
        script_ok script_error warn >"$work_dir/add_config_line.source"
    : >"$work_dir/wrapper_list.lst"
    cat >>"$glidein_config" <<C
ADD_CONFIG_LINE_SOURCE $work_dir/add_config_line.source
GLIDEIN_STARTUP_PID $$
GLIDEIN_START_DIR_ORIG $start_dir
GLIDEIN_WORKSPACE_ORIG $work_dir
GLIDEIN_WORK_DIR $work_dir/main
GLIDEIN_ENTRY_WORK_DIR ${area_dir[entry]}
GLIDECLIENT_WORK_DIR ${area_dir[client]}
GLIDECLIENT_GROUP_WORK_DIR ${area_dir[client_group]}
GLIDEIN_LOCAL_DIR $work_dir
TMP_DIR $work_dir/tmp
GLIDEIN_LOCAL_TMP_DIR $work_dir/tmp
WRAPPER_LIST $work_dir/wrapper_list.lst
PERIODIC_LIST $work_dir/periodic.lst
CONDOR_CONFIG_DIR $work_dir/condor_config.d
DEBUG_MODE ${option[v]:-std}
PROXY_URL ${option[proxy]:-None}
SLOTS_LAYOUT $([[ ${option[slotslayout]-} == fixed ]] && echo fixed || echo partitionable)
GLIDEIN_Factory ${option[factory]-}
GLIDEIN_Name ${option[name]}
GLIDEIN_Entry_Name ${option[entry]}
GLIDECLIENT_Name ${option[clientname]-}
GLIDECLIENT_Group ${option[clientgroup]-}
GLIDEIN_CredentialIdentifier ${option[submitcredid]-}
CONDORG_CLUSTER ${option[cluster]-}
CONDORG_SUBCLUSTER ${option[subcluster]-}
CONDORG_SCHEDD ${option[schedd]-}
GLIDEIN_Signature ${option[sign]}
GLIDEIN_Entry_Signature ${option[signentry]}
GLIDECLIENT_Signature ${option[clientsign]-}
GLIDECLIENT_Group_Signature ${option[clientsigngroup]-}
DESCRIPTION_FILE ${option[descript]}
DESCRIPTION_ENTRY_FILE ${option[descriptentry]}
GLIDECLIENT_DESCRIPTION_FILE ${option[clientdescript]-}
GLIDECLIENT_DESCRIPTION_GROUP_FILE ${option[clientdescriptgroup]-}
GLIDEIN_Pilot_Start $started
GLIDEIN_Pilot_Name glidein_$$_$RANDOM$RANDOM
C
}

# areas: where they are, and what vouches for them
areas() {
    local type=${option[signtype]:-sha256}
    # shellcheck disable=SC2153
    web_proxy=${option[proxy]:-None}
    case $web_proxy in None) web_proxy= ;; OSG) web_proxy=${OSG_SQUID_LOCATION-} ;; esac
    area_dir=([main]=$work_dir/main [entry]=$work_dir/entry_${option[entry]}
        [client]=$work_dir/client [client_group]=$work_dir/client_group)
    area_prefix=([main]='' [entry]=ENTRY_ [client]=GLIDECLIENT_ [client_group]=GLIDECLIENT_GROUP_)
    area_url=([main]=${option[web]} [entry]=${option[web]}/entry_${option[entry]})
    area_sign=([main]=${option[sign]} [entry]=${option[signentry]})
    area_description=([main]=${option[descript]} [entry]=${option[descriptentry]})
    area_type=([main]=$type [entry]=$type)
    if [[ -n ${option[clientweb]-} ]]; then add_client client clientweb clientsign clientdescript; fi
    if [[ -n ${option[clientwebgroup]-} ]]; then
        add_client client_group clientwebgroup clientsigngroup clientdescriptgroup
    fi
}

# add_client AREA URL-OPTION SIGN-OPTION DESCRIPTION-OPTION
add_client() {
    [[ -n ${option[$3]-} && -n ${option[$4]-} ]] || fail "option -$2 needs -$3 and -$4"
    area_url[$1]=${option[$2]} area_sign[$1]=${option[$3]} area_description[$1]=${option[$4]}
    area_type[$1]=${option[clientsigntype]:-${option[signtype]:-sha256}}
}

main() {
    local id name status
    start_dir=$PWD
    trap 'finish 1' EXIT
    for name in TERM INT QUIT HUP; do
        # shellcheck disable=SC2064
        trap "on_signal $name" "$name"
    done
    read_arguments "$@"
    case ${option[v]:-std} in fast | check) failure_delay=150 ;; *) failure_delay=1199 ;; esac
    failure_delay=${asked_delay:-$failure_delay}
    [[ ${option[entry]} =~ $safe_name ]] || fail "-entry ${option[entry]}: not a name"
    for name in curl tar gzip sha256sum openssl; do
        command -v "$name" >/dev/null || fail "this node lacks the command $name"
    done
    make_work_dir
    areas
    configure
    take_proxy
    take_tokens
    say "pilot $(gconfig_get GLIDEIN_Pilot_Name) of ${option[clientname]-nobody} for entry ${option[entry]} on $(uname -n) as $(id -un) in $work_dir"
    for id in main entry client client_group; do
        [[ -n ${area_url[$id]-} ]] && open_area "$id"
    done
    take_list main file_list
    take_list client preentry_file_list
    take_list client_group preentry_file_list
    take_list client aftergroup_preentry_file_list
    take_list entry file_list
    take_list main precvmfs_file_list
    take_list main at_file_list
    take_list client file_list
    take_list client_group file_list
    take_list client aftergroup_file_list
    take_list main after_file_list
    name=$(description main last_script)
    [[ -n $name ]] || fail "${option[descript]} names no last_script"
    fetch_checked main "$name" "${area_dir[main]}/${name%%.*}.sh"
    chmod 755 "${area_dir[main]}/${name%%.*}.sh"
    run main "${area_dir[main]}/${name%%.*}.sh"
    status=$?
    if [[ $status -ne 0 ]]; then
        reason="$last_script ended with code $status$(detail)"
        [[ -s $work_dir/otrb_output.xml ]] || warn "$reason"
    fi
    finish "$status"
}

main "$@"
