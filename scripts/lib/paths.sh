# Paths of downloads and servers. This file is sourced, never executed.
# shellcheck shell=bash disable=SC2034

KAFKA_VERSION=4.3.1

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${TALLYLINE_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/tallyline}
kafka_libs=$cache/kafka-$KAFKA_VERSION
prometheus_3=$cache/prometheus-sid
prometheus_2=$cache/prometheus-bookworm

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

heading() {
    printf '\n==> %s\n' "$*" >&2
}

# Prints the program folder of the newest installed PostgreSQL, 14 or later, or nothing.
postgres_bin() {
    local folder version best=0
    for folder in /usr/lib/postgresql/*/bin; do
        version=${folder#/usr/lib/postgresql/}
        version=${version%/bin}
        [[ $version =~ ^[0-9]+$ && -x $folder/initdb ]] || continue
        ((version >= 14 && version > best)) && best=$version
    done
    ((best == 0)) || printf '/usr/lib/postgresql/%s/bin\n' "$best"
}

# Prints the path of a Debian Java that is new enough for the broker (17), or nothing.
java_program() {
    local program version
    for program in /usr/lib/jvm/java-*-openjdk-*/bin/java; do
        version=${program#/usr/lib/jvm/java-}
        version=${version%%-*}
        [[ $version =~ ^[0-9]+$ && -x $program ]] || continue
        ((version >= 17)) && printf '%s\n' "$program" && return
    done
}
