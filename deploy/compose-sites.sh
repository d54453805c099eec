#!/bin/sh
# Prints what docker-compose.yml needs for a demo with N sites instead of three:
#   deploy/compose-sites.sh 5 >docker-compose.sites.yml
#   docker compose -f docker-compose.yml -f docker-compose.sites.yml up
set -eu
case ${1:-} in
"" | *[!0-9]*) echo "usage: $0 NUMBER_OF_SITES" >&2 && exit 2 ;;
esac
if [ "$1" -lt 4 ] || [ "$1" -gt 50 ]; then
    echo "$0: docker-compose.yml has three sites; the number has to be between 4 and 50" >&2
    exit 2
fi
sites=$(seq 4 "$1")

echo "# Made by deploy/compose-sites.sh $1"
echo "services:"
echo "  certificates:"
echo "    volumes:"
for n in $sites; do echo "      - site-$n-keys:/to/sites/site-$n"; done
echo "  data:"
echo "    volumes:"
for n in $sites; do echo "      - site-$n-data:/to/site-$n"; done
echo "  gate:"
echo "    networks:"
for n in $sites; do echo "      site-$n: {}"; done
echo "  run:"
echo "    command: [--set, rounds.min-sites=$1]"
for n in $sites; do
    cat <<END
  site-$n-messenger:
    extends: {file: docker-compose.yml, service: site-1-messenger}
    build: !reset null
    networks: !override {site-$n: {}}
    volumes: !override ["site-$n-keys:/etc/giva:ro", "site-$n-socket:/run/giva:ro"]
    depends_on: !override
      gate: {condition: service_healthy}
      approve: {condition: service_completed_successfully}
      site-$n-worker: {condition: service_healthy}
  site-$n-worker:
    extends: {file: docker-compose.yml, service: site-1-worker}
    build: !reset null
    volumes: !override ["site-$n-data:/srv/giva:ro", "site-$n-socket:/run/giva", "site-$n-cache:/var/lib/giva"]
END
done
echo "networks:"
for n in $sites; do echo "  site-$n: {internal: true}"; done
echo "volumes:"
for n in $sites; do
    for what in keys data socket cache; do echo "  site-$n-$what:"; done
done
