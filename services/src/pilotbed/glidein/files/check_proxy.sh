#!/bin/bash
# Is the pilot's proxy good, and for how long? Sets X509_EXPIRE, which limits the pilot's life.
#   GLIDEIN_Min_Proxy_Life (900)  seconds that must be left
glidein_config=$1
# shellcheck source=/dev/null
. "$(sed -n 's/^ADD_CONFIG_LINE_SOURCE //p' "$glidein_config")"

proxy=$(gconfig_get X509_USER_PROXY) ca=$(gconfig_get X509_CERT_DIR) wanted=$(gconfig_get GLIDEIN_Min_Proxy_Life)
[[ -n $proxy ]] || script_error VO_Proxy "the pilot came without a proxy: X509_USER_PROXY is not set"
[[ $(stat -c %a "$proxy") == 600 && -O $proxy ]] || script_error VO_Proxy "$proxy can be read by others"
# The certificate of a chain that ends first counts.
expire=
while read -r end; do
    end=$(date --date="$end" +%s)
    [[ -n $expire && $expire -le $end ]] || expire=$end
done < <(openssl crl2pkcs7 -nocrl -certfile "$proxy" 2>/dev/null | openssl pkcs7 -print_certs -text -noout 2>/dev/null |
    sed -n 's/.*Not After *: //p')
[[ -n $expire ]] || script_error VO_Proxy "the pilot's proxy is not a certificate"
left=$((expire - $(date +%s)))
[[ $left -ge ${wanted:-900} ]] ||
    script_error VO_Proxy "the pilot's proxy has $left s left, ${wanted:-900} are needed"
[[ $(openssl x509 -noout -pubkey -in "$proxy" 2>/dev/null) == "$(openssl pkey -pubout -in "$proxy" 2>/dev/null)" ]] ||
    script_error VO_Proxy "the pilot's proxy has no private key, or one that does not belong to it"
problem=$(openssl verify -allow_proxy_certs -CApath "$ca" -untrusted "$proxy" "$proxy" 2>&1) ||
    script_error VO_Proxy "the pilot's proxy is not trusted here: $(tr '\n' ' ' <<<"$problem")"
gconfig_add X509_EXPIRE "$expire"
script_ok proxy_left "$left"
