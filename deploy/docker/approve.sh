#!/bin/sh
# Tells the operator's commands where the SuperLink is, and registers the key of every site whose .pub lies in /etc/giva
# and that is not registered yet. Who was revoked stays out: the SuperLink takes no such key again.
set -eu
giva superlink add demo superlink:8000 --root-certificates /etc/giva/ca.crt
sites=$(giva site list --all --superlink demo --json)
names() {
    printf '%s' "$sites" | python -c '
import json, sys
sites = json.load(sys.stdin)["data"]["sites"]
print(*(site["site"] for site in sites if (site["status"] == "revoked") == (sys.argv[1] == "revoked")))' "$1"
}
approved=$(names approved)
revoked=$(names revoked)
for key in /etc/giva/*.pub; do
    name=$(basename "$key" .pub)
    case " $approved " in
    *" $name "*) continue ;;
    esac
    case " $revoked " in
    *" $name "*) echo "$name was revoked; a new key of its own needs giva site approve $key --name $name" >&2 ;;
    *) giva site approve "$key" --name "$name" --superlink demo ;;
    esac
done
giva site list --superlink demo
