#!/bin/sh
# Makes the demo's certificates and keys in /var/lib/giva, and gives everybody what is theirs and no more: each folder
# below /to is another volume, /to/sites/NAME that of a site. Can be run again.
set -eu
cd /var/lib/giva
PATH=/opt/fedgiva/deploy/docker:$PATH # its ssh-keygen stands in for OpenSSH's
export PATH

set -- --host superlink --host gate
for folder in /to/sites/*; do
    set -- "$@" --site "$(basename "$folder")"
done
sh /opt/fedgiva/deploy/make-certificates.sh pki "$@"

give() { # give FOLDER FILE...: a copy of each file for the images' user
    folder=$1 && shift
    install -o 10001 -g 10001 -m 0400 "$@" "$folder"
    chown 10001:10001 "$folder" && chmod 0700 "$folder"
}
give /to/superlink pki/ca.crt pki/server.crt pki/server.key pki/superexec.secret
give /to/gate pki/ca.crt pki/server.crt pki/server.key
give /to/server pki/ca.crt pki/superexec.secret
for folder in /to/sites/*; do
    site=$(basename "$folder")
    give "$folder" pki/ca.crt
    install -o 10001 -g 10001 -m 0400 "pki/$site.key" "$folder/site.key"
    install -o 10001 -g 10001 -m 0400 "pki/$site.pub" /to/server
done
