#!/bin/bash
# Which of the stage's HTCondors fits this node? CONDOR_PLATFORMS is a file of lines VARIABLE OS ARCH, the best one first; OS
# and ARCH may be *. The first that fits has its VARIABLE set to 1, which is its tarball's condition.
#   CONDOR_OS, CONDOR_ARCH    auto (default, also "default"): what the node says; else what is taken instead
# OS is as in glideinWMS: ID and major VERSION_ID of os-release (debian13), or rhelN for what says that it is like rhel.
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"

release() { (
    # shellcheck source=/dev/null
    for file in "${OS_RELEASE:-/etc/os-release}" /usr/lib/os-release; do [[ ! -r $file ]] || { . "$file" && break; }; done
    id=${ID-} version=${VERSION_ID-}
    [[ " ${ID_LIKE-} " != *" rhel "* ]] || id=rhel
    printf '%s%s' "$id" "${version%%.*}"
); }
os=$(gconfig_get CONDOR_OS) arch=$(gconfig_get CONDOR_ARCH) offered=''
case $os in '' | auto | default) os=$(release) ;; esac
case $arch in '' | auto | default) arch=$(uname -m) ;; esac
while read -r variable has_os has_arch; do
    if [[ ($has_os == "*" || $has_os == "$os") && ($has_arch == "*" || $has_arch == "$arch") ]]; then
        gconfig_add "$variable" 1
        script_ok
        exit
    fi
    offered+="${offered:+, }$has_os on $has_arch"
done <"$(gconfig_get CONDOR_PLATFORMS)"
script_error WN_Resource "the factory has no HTCondor for ${os:-an unknown system} on $arch: it has $offered" \
    os "$os" arch "$arch"
