#!/bin/sh
# Makes what a federation on real machines has to have before it starts, for trying things out and for small federations:
# a certificate authority of its own, the SuperLink's certificate, a key pair for each site, and the secret that only the
# server's own processes know. Needs openssl and ssh-keygen. docs/deploy.md says what to do where an authority exists.
#
#   make-certificates.sh OUT_FOLDER [--host NAME_OR_ADDRESS ...] [--site NAME ...] [--days N] [--renew]
#
#   --host   a name or address under which sites and operators reach the SuperLink; localhost, 127.0.0.1 and ::1 always work
#   --site   a site that gets a key pair; better, the site makes its own and sends the .pub file alone
#   --days   how long the SuperLink's certificate is valid (default 397; the authority's own: 3650)
#   --renew  make a new SuperLink certificate, with a new key, even where the old one is good
#
# It can be run again: what is there and good is kept. The SuperLink's certificate is made anew where it ends within 30
# days, does not name all hosts, or is not the authority's. Private files are 0600.
set -euf

fail() {
    echo "make-certificates: $*" >&2
    exit 2
}

out="" hosts="" sites="" days=397 renew=""
while [ $# -gt 0 ]; do
    case $1 in
    --host | --site | --days)
        [ $# -gt 1 ] || fail "$1 needs a value"
        case $2 in "" | *[[:space:]]*) fail "$1 takes one word, not '$2'" ;; esac
        ;;
    esac
    case $1 in
    --host) hosts="$hosts $2" && shift 2 ;;
    --site) sites="$sites $2" && shift 2 ;;
    --days) days=$2 && shift 2 ;;
    --renew) renew=yes && shift ;;
    -h | --help) sed -n '2,/^set/{/^#/{s/^# \{0,1\}//;p}}' "$0" && exit 0 ;;
    -*) fail "there is no option $1; see --help" ;;
    *) [ -z "$out" ] || fail "one folder, not two: $out and $1" && out=$1 && shift ;;
    esac
done
[ -n "$out" ] || fail "name the folder in which the files are to lie; see --help"
case $days in "" | *[!0-9]*) fail "--days takes a whole number, not '$days'" ;; esac
for tool in openssl ssh-keygen; do
    command -v "$tool" >/dev/null || fail "$tool is needed and not installed"
done

names=""
for host in localhost 127.0.0.1 ::1 $hosts; do
    case $host in
    *[!A-Za-z0-9.:*-]*) fail "'$host' is neither a host name nor an address" ;;
    *:*) name="IP:$host" ;;
    *[!0-9.]*) name="DNS:$host" ;;
    *) name="IP:$host" ;;
    esac
    case ",$names," in *",$name,"*) ;; *) names="$names${names:+,}$name" ;; esac
done
for site in $sites; do
    case $site in
    [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) fail "'$site' cannot be a site's name: letters, digits and . _ - alone" ;;
    ca | server | superexec) fail "'$site' is what another file here is called; choose another name for the site" ;;
    esac
done

mkdir -p "$out"
cd "$out"
umask 077
work=$(mktemp -d .making-XXXXXX)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
log=$work/log

quietly() { # openssl tells its progress on stderr; it is shown only where it fails
    "$@" >"$log" 2>&1 || {
        cat "$log" >&2
        exit 1
    }
}

if [ -s ca.key ] && [ -s ca.crt ]; then
    openssl x509 -in ca.crt -noout -checkend 0 >/dev/null ||
        fail "the authority $PWD/ca.crt has ended; move ca.key and ca.crt away, run again, and give every site the new ca.crt"
    echo "kept     ca.crt, ca.key"
else
    [ ! -e ca.key ] && [ ! -e ca.crt ] || fail "only one of ca.key and ca.crt is in $PWD; put the other back, or move it away"
    quietly openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -sha384 -days 3650 \
        -subj "/CN=fedgiva authority $(date -u +%Y-%m-%d)" -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout "$work/ca.key" -out "$work/ca.crt"
    chmod 644 "$work/ca.crt"
    mv "$work/ca.key" ca.key
    mv "$work/ca.crt" ca.crt
    echo "made     ca.crt, ca.key"
fi

is_good() { # the SuperLink's certificate: the authority's, valid for 30 days more, and naming every host
    [ -s server.crt ] && [ -s server.key ] || return 1
    openssl verify -CAfile ca.crt server.crt >/dev/null 2>&1 || return 1
    openssl x509 -in server.crt -noout -checkend 2592000 >/dev/null || return 1
    quietly openssl req -new -key server.key -subj "/CN=wanted" -addext "subjectAltName=$names" -out "$work/wanted.csr"
    openssl x509 -in server.crt -noout -pubkey >"$work/has.pub"
    openssl req -in "$work/wanted.csr" -noout -pubkey | cmp -s - "$work/has.pub" || return 1
    openssl x509 -in server.crt -noout -text | grep -A1 "Subject Alternative Name" | tail -n 1 >"$work/has.names"
    openssl req -in "$work/wanted.csr" -noout -text | grep -A1 "Subject Alternative Name" | tail -n 1 |
        tr ',' '\n' | sed 's/^ *//' >"$work/wanted.names"
    while read -r name; do
        tr ',' '\n' <"$work/has.names" | sed 's/^ *//' | grep -qxF "$name" || return 1
    done <"$work/wanted.names"
}

if [ -z "$renew" ] && is_good; then
    echo "kept     server.crt, server.key"
else
    cat >"$work/extensions" <<END
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
END
    quietly openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -sha384 -subj "/CN=fedgiva SuperLink" \
        -keyout "$work/server.key" -out "$work/server.csr"
    quietly openssl x509 -req -in "$work/server.csr" -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" \
        -sha384 -days "$days" -extfile "$work/extensions" -out "$work/server.crt"
    chmod 644 "$work/server.crt"
    mv "$work/server.key" server.key
    mv "$work/server.crt" server.crt
    echo "made     server.crt, server.key for $names"
fi

if [ -s superexec.secret ]; then
    echo "kept     superexec.secret"
else
    openssl rand -out "$work/superexec.secret" 32
    mv "$work/superexec.secret" superexec.secret
    echo "made     superexec.secret"
fi

for site in $sites; do
    if [ -s "$site.key" ] && [ -s "$site.pub" ]; then
        echo "kept     $site.key, $site.pub"
        continue
    fi
    [ ! -e "$site.key" ] && [ ! -e "$site.pub" ] || fail "only one of $site.key and $site.pub is in $PWD; move it away"
    quietly ssh-keygen -q -t ecdsa -b 384 -N "" -C "$site" -f "$work/$site"
    chmod 644 "$work/$site.pub"
    mv "$work/$site" "$site.key"
    mv "$work/$site.pub" "$site.pub"
    echo "made     $site.key, $site.pub"
done

cat <<END
In $PWD; the SuperLink's certificate is valid until$(openssl x509 -in server.crt -noout -enddate | sed 's/.*=/ /').
Sites and operators get ca.crt; a site its own .key. ca.key and superexec.secret stay with the server's operator.
END
