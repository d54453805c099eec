#!/bin/sh
# Prepares the demo's model and data in /var/lib/giva and deals them out: each folder /to/NAME is the volume of one site and
# gets its data, the model and its site.toml. Can be run again. Where no package index can be reached, the archives lie in
# /archives.
set -eu
sites=0
for folder in /to/*; do
    sites=$((sites + 1))
done

set -- medical --sites "$sites"
if [ -n "$(ls /archives)" ]; then
    set -- "$@" --archives /archives
fi
giva data prepare "$@"

for folder in /to/*; do
    site=$(basename "$folder")
    rm -rf "$folder/data" "$folder/models"
    mkdir "$folder/data" "$folder/models"
    cp "/var/lib/giva/data/medical-dirichlet-${sites}sites"-*/sites/"$site"/*.jsonl "$folder/data"
    cp -r /var/lib/giva/models/all-MiniLM-L6-v2 "$folder/models"
    sed "s/^name = .*/name = \"$site\"/" /opt/fedgiva/deploy/docker/site.toml >"$folder/site.toml"
    chown -R 10001:10001 "$folder"
    chmod -R u=rX,go= "$folder"
done
