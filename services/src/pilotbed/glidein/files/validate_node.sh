#!/bin/bash
# Can this node run a pilot at all? Asked before anything big is fetched.
#   GLIDEIN_Min_Disk_MB (100)  free space below the work directory
#   X509_CERT_DIR              CA certificates; default /etc/grid-security/certificates
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"

wanted=$(gconfig_get GLIDEIN_Min_Disk_MB)
free=$(df --output=avail -m . | tail -1)
[[ ${free// /} -ge ${wanted:-100} ]] ||
    script_error WN_Resource "$PWD has ${free// /} MB of free space, ${wanted:-100} are needed" disk "$PWD"
[[ -x /usr/bin/python3 ]] || script_error WN_Resource "this node lacks /usr/bin/python3" command python3
[[ $(id -u) -ne 0 ]] || script_error WN_Resource "a pilot must not run as root"
# condor_master hangs without a word when it cannot resolve the node's name.
getent hosts "$(uname -n)" >/dev/null ||
    script_error WN_Resource "the name of this node, $(uname -n), does not resolve" host "$(uname -n)"

ca=$(gconfig_get X509_CERT_DIR)
ca=${ca:-${X509_CERT_DIR:-/etc/grid-security/certificates}}
compgen -G "$ca/*.0" >/dev/null || script_error WN_Resource "there are no CA certificates in $ca" directory "$ca"
gconfig_add X509_CERT_DIR "$ca"
script_ok disk_mb "${free// /}"
