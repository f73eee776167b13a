#!/bin/bash
# error_gen.sh -ok TEST [METRIC VALUE]... | -error TEST TYPE TEXT [METRIC VALUE]...
# Writes what a test found to otrb_output.xml in the current directory (OSGTestResult 4.3.1), and an error to stderr.

shopt -u patsub_replacement 2>/dev/null # bash 5.2: an & in a replacement is not what was found
xml() {
    local text=$1
    text=${text//&/&amp;} text=${text//</&lt;} text=${text//>/&gt;} text=${text//\"/&quot;}
    printf '%s' "$text"
}

metric() { printf '    <metric name="%s" ts="%s" uri="local">%s</metric>\n' "$(xml "$1")" "$now" "$(xml "$2")"; }

now=$(date +%Y-%m-%dT%H:%M:%S%:z) kind=$1 test=$2 type='' text=''
shift 2
case $kind in
-ok) status=OK ;;
-error) status=ERROR type=$1 text=$2 && shift 2 ;;
*) printf 'error_gen.sh: %s is neither -ok nor -error\n' "$kind" >&2 && exit 1 ;;
esac
{
    printf '<?xml version="1.0"?>\n<OSGTestResult id="%s" version="4.3.1">\n  <result>\n    <status>%s</status>\n' \
        "$(xml "$test")" "$status"
    [[ -n $type ]] && metric failure "$type"
    while [[ $# -ge 2 ]]; do
        metric "$1" "$2"
        shift 2
    done
    printf '  </result>\n'
    [[ -n $text ]] && printf '  <detail>\n    %s\n  </detail>\n' "$(xml "$text")"
    printf '</OSGTestResult>\n'
} >otrb_output.xml
[[ -z $text ]] || printf 'glidein: %s: %s\n' "$test" "$text" >&2
