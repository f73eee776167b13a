#!/bin/bash
# Do the payloads of this pilot run under accounts of their own, through glexec?
#   GLIDEIN_Glexec_Use          the VO's wish: NEVER, OPTIONAL or REQUIRED; a VO that says nothing has it where it is offered
#   GLEXEC_BIN                  what the entry offers: NONE, auto or a path
#   GLIDEIN_REQUIRE_GLEXEC_USE  True: the entry insists
# Sets GLEXEC_JOB and GLEXEC_BIN. Fails closed: a glexec that is there must work.
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"

# decide WISH OFFER INSISTS FOUND: use, or leave, or why the pilot must end
decide() {
    local wish=$1 offer=$2 insists=$3 found=$4
    case $wish/$offer in
    NEVER/*) [[ $insists == true ]] && echo "the entry requires glexec, the VO never uses it" || echo leave ;;
    OPTIONAL/NONE) [[ $insists == true ]] && echo "the entry requires glexec, but has none" || echo leave ;;
    REQUIRED/NONE) echo "the VO requires glexec, the entry has none" ;;
    OPTIONAL/auto)
        if [[ -n $found ]]; then
            echo use
        elif [[ $insists == true ]]; then
            echo "the entry requires glexec, but this node has none"
        else
            echo leave
        fi
        ;;
    OPTIONAL/* | REQUIRED/*)
        if [[ -n $found ]]; then echo use; else echo "this node has no glexec (GLEXEC_BIN $offer)"; fi
        ;;
    *) echo "GLIDEIN_Glexec_Use $wish is not NEVER, OPTIONAL or REQUIRED" ;;
    esac
}

# find OFFER: the path of the glexec offered, or nothing
find_glexec() {
    local candidate
    case $1 in
    NONE) ;;
    auto)
        for candidate in "${GLEXEC_LOCATION:-/usr}/sbin/glexec" /usr/sbin/glexec /opt/glite/sbin/glexec; do
            [[ -x $candidate ]] && echo "$candidate" && return
        done
        ;;
    *) [[ $1 =~ ^/[A-Za-z0-9/._-]+$ && -x $1 ]] && echo "$1" ;;
    esac
}

# Does it work? The pilot's own proxy is all there is to try it with.
#   code 0, and another account: the site maps pilots, too.
#   code 203, since LCMAPS gives this proxy a pilot's account, and no payload may have one: white list, sudo,
#   configuration, LCMAPS, CA and VOMS checks have done their work. Any other 203 is a glexec that refuses everybody.
try() {
    local output status
    output=$("$glexec" -V 2>&1 </dev/null) || { problem="$glexec -V: code $?: ${output//$'\n'/ }" && return 1; }
    output=$(GLEXEC_CLIENT_CERT=$proxy timeout 60 "$glexec" "$@" 2>&1 </dev/null)
    status=$?
    case $status in
    0)
        [[ $output == *"Hello World"* ]] || { problem="$glexec lost the output: ${output//$'\n'/ }" && return 1; }
        [[ $output != "uid=$(id -u)("* ]] || { problem="$glexec did not change the account" && return 1; }
        ;;
    203)
        [[ $output == *"is not in pool_accounts"* ]] ||
            { problem="$glexec: code 203: ${output//$'\n'/ }" && return 1; }
        ;;
    *) problem="$glexec: code $status: ${output//$'\n'/ }" && return 1 ;;
    esac
}

wish=$(gconfig_get GLIDEIN_Glexec_Use) offer=$(gconfig_get GLEXEC_BIN)
insists=$(gconfig_get GLIDEIN_REQUIRE_GLEXEC_USE) proxy=$(gconfig_get X509_USER_PROXY) problem=''
# Where the VO is silent the entry decides. It has to be there where it is offered: else whoever takes it off a node gets
# other users' payloads under the pilot's account.
case $offer in '' | NONE) silence=OPTIONAL ;; *) silence=REQUIRED ;; esac
glexec=$(find_glexec "${offer:-auto}")
decision=$(decide "${wish:-$silence}" "${offer:-auto}" "${insists,,}" "$glexec")
case $decision in
leave)
    gconfig_add GLEXEC_BIN NONE
    gconfig_add GLEXEC_JOB False
    gconfig_add GLEXEC_JOB_WRAPPER 0
    ;;
use)
    shell=$(readlink -f /bin/sh) # glexec refuses links
    test_script=$(gconfig_get GLIDEIN_LOCAL_DIR)/glexec_test.sh
    printf '#!%s\nid && echo Hello World\n' "$shell" >"$test_script"
    chmod 755 "$test_script"
    # An account of the site must come as far as here to find its sandbox.
    directory=$(gconfig_get GLIDEIN_LOCAL_DIR)
    while [[ $directory != / ]]; do
        [[ $(stat -c %A "$directory") == *[xt] ]] || chmod a+x "$directory" 2>/dev/null ||
            script_error WN_Resource "$directory is closed to other accounts: payloads cannot reach their sandboxes"
        directory=$(dirname "$directory")
    done
    if ! { try "$shell" -c 'id && echo Hello World' && try "$test_script"; }; then
        script_error WN_Resource "glexec does not work here: $problem" command "$glexec"
    fi
    rm -f "$test_script"
    gconfig_add ALTERNATIVE_SHELL "$shell"
    gconfig_add GLEXEC_BIN "$glexec"
    gconfig_add GLEXEC_JOB True
    gconfig_add GLEXEC_JOB_WRAPPER 1
    ;;
*) script_error Config "$decision" ;;
esac
script_ok glexec "$decision"
