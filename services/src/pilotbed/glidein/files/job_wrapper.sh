#!/usr/bin/busybox sh
# shellcheck shell=dash
# USER_JOB_WRAPPER of a pilot's starter: has glexec run the job as the account of the job's user.
#
# The starter gives this program the job's environment, which the user wrote, and the pilot's uid. So it must not be loaded
# by the dynamic loader (LD_PRELOAD=./mine.so would run as the pilot): busybox is a static program, from busybox-static, and
# a dynamic busybox is refused below. Until the environment is gone, nothing else is started.
#
# Exit codes 201..203 are glexec's and mean that nothing ran. glexec then also writes the reason to
# _CONDOR_WRAPPER_ERROR_FILE, upon which the starter gives the job back to the queue ("Shadow exception!" in its log).

box=/usr/bin/busybox
glexec=/usr/sbin/glexec
sandbox=$(pwd -P)
failure=$sandbox/.job_wrapper_failure

refuse() {
    echo "job wrapper: $1" >&2
    $box rm -f "$failure"
    echo "job wrapper: $1" >"$failure"
    exit 202
}

case $1 in
*/sshd)
    # condor_ssh_to_job would get a shell as the pilot. The job itself goes on: no failure is reported.
    echo "job wrapper: condor_ssh_to_job is not offered where jobs run under glexec" >&2
    exit 1
    ;;
esac

# A loader named in the program's header: it is dynamic, and the damage may be done.
case $($box head -c 4096 "/proc/$$/exe" | $box tr -d '\0') in
*ld-linux*) refuse "$box is not static: install busybox-static" ;;
esac

# What names the sandbox and the proxy came with the job's environment, too: another job's may not be meant.
[ "$_CONDOR_SCRATCH_DIR" = "$sandbox" ] || refuse "the job's directory $sandbox is not _CONDOR_SCRATCH_DIR"
[ -n "$X509_USER_PROXY" ] || refuse "the job has no proxy: submit it with x509userproxy"
[ "${X509_USER_PROXY%/*}" = "$sandbox" ] || refuse "the job's proxy $X509_USER_PROXY is not in its directory $sandbox"
[ -x "$glexec" ] || refuse "$glexec is missing on this node"

wrapped=$($box gzip -c <"/proc/$$/environ" | $box base64 -w 0)
# The kernel takes no longer string (MAX_ARG_STRLEN); exec would say "Argument list too long".
[ ${#wrapped} -lt 131000 ] || refuse "the job's environment is too large for glexec"
job=$($box sed -n 's/^GlobalJobId = "\(.*\)"$/\1/p' .job.ad)

exec $box env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    GLEXEC_CLIENT_CERT="$X509_USER_PROXY" \
    GLEXEC_SOURCE_PROXY="$X509_USER_PROXY" \
    GLEXEC_TARGET_PROXY="$sandbox/.glexec_proxy" \
    GLEXEC_SANDBOX="$sandbox" \
    GLEXEC_ENV="$wrapped" \
    GLEXEC_ID="$job" \
    _CONDOR_WRAPPER_ERROR_FILE="$failure" \
    "$glexec" -- /usr/bin/glexec_unwrapenv -- "$@"
