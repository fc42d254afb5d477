# Starts one PostgreSQL and one Kafka broker for tests, on free loopback ports with temporary data, and stops only these. This file is
# sourced after paths.sh, never executed. The caller calls start_servers once; an exit trap stops the servers.
# shellcheck shell=bash source=scripts/lib/paths.sh disable=SC2154

servers="" # the folder that holds all their data, logs, and the temporary files of what is run beside them
postgres_pid="" kafka_pid="" command_pid=""
# Whether the servers trade safety and defaults for speed: for tests, not for benchmarks. The caller sets it.
quick_servers=""
# Whether PostgreSQL counts the time of statements (pg_stat_statements): for benchmarks. The caller sets it.
count_statements=""

# Reserves a block of 200 ports for this run. A lock keeps other runs out. The block is below Linux's range for outgoing connections. The
# first ten ports are for the servers, the others for the tests (TALLYLINE_TEST_PORTS).
take_ports() {
    local locks=/tmp/tallyline-ports block offset port
    mkdir -p -m 1777 "$locks"
    for block in {0..49}; do
        # a file of another user can be read and locked, but not written
        [[ -e $locks/$block ]] || (umask 022 && : >"$locks/$block") 2>/dev/null || true
        exec {ports_lock}<"$locks/$block"
        first_port=$((20000 + block * 200))
        if flock -n "$ports_lock"; then
            for offset in 0 1 2 3 4; do
                port=$((first_port + offset))
                ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
            done
            return
        fi
        exec {ports_lock}>&-
    done
    fail "no free block of ports: all from 20000 to 29999 are in use"
}

# PostgreSQL refuses root, so root starts it as the user of its package. A server must not outlive this script, even a killed one.
as_postgres() {
    local user=()
    ((EUID != 0)) || user=(--reuid=postgres --regid=postgres --init-groups)
    exec setpriv "${user[@]}" --pdeathsig=QUIT "$@"
}

# Whether this number of GiB of memory is free for each run, including this one, and /dev/shm can have it.
has_memory() {
    local others limit kib
    others=$(find /dev/shm -maxdepth 1 -name 'tallyline-servers.*' 2>/dev/null | wc -l)
    kib=$(($1 * 1048576 * (1 + others)))
    [[ -w /dev/shm && $(stat -f -c %T /dev/shm) == tmpfs ]] || return 1
    (($(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo) >= kib)) || return 1
    (($(df --output=avail -k /dev/shm | tail -n 1) >= kib)) || return 1
    limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null) || limit=max
    [[ $limit == max ]] || (((limit - $(cat /sys/fs/cgroup/memory.current)) / 1024 >= kib))
}

# The folder in memory that belongs to a folder with the servers' data.
in_memory() {
    printf '/dev/shm/%s' "${1##*/}"
}

start_postgres() {
    local bin data=$servers/postgres quick=()
    bin=$(postgres_bin)
    # Most tests create a database or two: 300 files each, which a disk creates ten times slower than memory.
    if [[ -n $quick_servers ]] && has_memory 4; then
        data=$(in_memory "$servers")
        export TALLYLINE_TEST_POSTGRES_IN_MEMORY=yes
    fi
    mkdir -m 700 "$data"
    ((EUID != 0)) || chown postgres: "$data"
    (cd / && as_postgres "$bin/initdb" -D "$data" -U postgres -A trust --no-sync -E UTF8 --locale=C.UTF-8) >"$servers/initdb.log" 2>&1 ||
        fail "initdb: $(tail -n 5 "$servers/initdb.log")"
    # No test kills this server: those that kill one start their own, with fsync. Most of the hundreds of
    # databases are idle, so autovacuum need not visit each of them every minute.
    [[ -z $quick_servers ]] || quick=(-c fsync=off -c wal_init_zero=off -c autovacuum_naptime=10min)
    [[ -z $count_statements ]] || quick+=(-c shared_preload_libraries=pg_stat_statements -c pg_stat_statements.track_planning=on)
    as_postgres "$bin/postgres" -D "$data" -h 127.0.0.1 -p "$first_port" -c unix_socket_directories= -c max_connections=500 \
        -c shared_buffers=256MB -c max_wal_size=2GB -c log_line_prefix='%m [%p] %d %a ' ${quick[@]+"${quick[@]}"} >"$servers/postgres.log" 2>&1 &
    postgres_pid=$!
    export TALLYLINE_TEST_POSTGRES_BIN=$bin
    export TALLYLINE_TEST_POSTGRES=postgres://postgres@127.0.0.1:$first_port/postgres
}

start_kafka() {
    local java data=$servers/kafka broker=$((first_port + 1)) controller=$((first_port + 2)) behind=$((first_port + 3)) proxy=$((first_port + 4)) quick=() java_options=${KAFKA_JAVA_OPTIONS:-}
    java=$(java_program)
    mkdir "$data"
    cat >"$servers/kafka.properties" <<END
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$controller
# A broker sends clients the address for further requests. Clients of the listener PROXIED get a port with a test's own proxy.
listeners=PLAINTEXT://127.0.0.1:$broker,PROXIED://127.0.0.1:$behind,CONTROLLER://127.0.0.1:$controller
advertised.listeners=PLAINTEXT://127.0.0.1:$broker,PROXIED://127.0.0.1:$proxy
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs=$data
auto.create.topics.enable=false
# One node stores everything. All group limits here are the broker's defaults, as at most sites.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
END
    # The fault harness starts its own broker with this program and these properties, on its own ports.
    cat >"$servers/kafka-program" <<END
#!/bin/sh
exec "$java" \${KAFKA_JAVA_OPTIONS:--Xms512m -Xmx1g -XX:+UseG1GC} "-Dlog4j2.configurationFile=$repository/scripts/kafka/log4j2.xml" \\
    -cp "$kafka_libs/*" "\$@"
END
    chmod +x "$servers/kafka-program"
    KAFKA_JAVA_OPTIONS="-Xmx256m -XX:TieredStopAtLevel=1 -XX:+UseSerialGC" "$servers/kafka-program" kafka.tools.StorageTool format \
        -t MkU3OEVBNTcwNTJENDM2Qg -c "$servers/kafka.properties" >"$servers/kafka-format.log" 2>&1 ||
        fail "formatting Kafka's storage: $(tail -n 5 "$servers/kafka-format.log")"
    # A quick broker does not wait for further members of an empty group, and in the new group protocol
    # it notices a killed member as soon as in the classic one. In its few minutes the best compiler of
    # Java costs more than it gains.
    if [[ -n $quick_servers ]]; then
        java_options=${KAFKA_JAVA_OPTIONS:--Xms512m -Xmx1g -XX:+UseSerialGC -XX:TieredStopAtLevel=1}
        quick=(
            --override group.initial.rebalance.delay.ms=0
            --override group.consumer.min.session.timeout.ms=6000
            --override group.consumer.session.timeout.ms=6000
            --override group.consumer.min.heartbeat.interval.ms=500
            --override group.consumer.heartbeat.interval.ms=500
        )
    fi
    KAFKA_JAVA_OPTIONS=$java_options setpriv --pdeathsig=KILL "$servers/kafka-program" kafka.Kafka \
        "$servers/kafka.properties" ${quick[@]+"${quick[@]}"} >"$servers/kafka.log" 2>&1 &
    kafka_pid=$!
    export TALLYLINE_TEST_KAFKA_PROGRAM=$servers/kafka-program TALLYLINE_TEST_KAFKA_PROPERTIES=$servers/kafka.properties
    export TALLYLINE_TEST_KAFKA=127.0.0.1:$broker
    export TALLYLINE_TEST_KAFKA_BEHIND_PROXY=127.0.0.1:$behind TALLYLINE_TEST_KAFKA_PROXY=127.0.0.1:$proxy
}

# await_server NAME PID LOG CHECK...: waits until the check succeeds. Fails after 60 seconds or if the server ends, with the end of its log.
await_server() {
    local name=$1 pid=$2 log=$3 deadline=$((SECONDS + 60))
    shift 3
    until "$@" >/dev/null 2>&1; do
        kill -0 "$pid" 2>/dev/null || fail "$name ended: $(tail -n 20 "$log")"
        ((SECONDS < deadline)) || fail "$name did not answer within 60 s: $(tail -n 20 "$log")"
        sleep 0.05
    done
}

port_answers() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1")
}

# A killed run cannot remove its folder. A folder in use is locked.
remove_stale_folders() {
    local lock
    for lock in /tmp/tallyline-servers.*/lock; do
        [[ -O $lock ]] || continue
        (
            exec 9>>"$lock"
            ! flock -n 9 || rm -rf "$(in_memory "${lock%/lock}")" "${lock%/lock}"
        )
    done
}

start_servers() {
    trap stop_servers EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    take_ports
    remove_stale_folders
    servers=$(mktemp -d /tmp/tallyline-servers.XXXXXX)
    exec {servers_lock}>"$servers/lock"
    flock -n "$servers_lock"
    chmod 711 "$servers" # the postgres user passes through
    mkdir -m 1777 "$servers/tmp"
    set -m # each server in a process group of its own: Ctrl-C reaches this script only, which stops them in order
    start_postgres
    start_kafka
    set +m
    await_server PostgreSQL "$postgres_pid" "$servers/postgres.log" "$(postgres_bin)/pg_isready" -h 127.0.0.1 -p "$first_port"
    await_server Kafka "$kafka_pid" "$servers/kafka.log" port_answers "$((first_port + 1))"
    export TALLYLINE_TEST_PROMETHEUS_3=$prometheus_3/usr/bin/prometheus
    export TALLYLINE_TEST_PROMETHEUS_2=$prometheus_2/usr/bin/prometheus
    export TALLYLINE_TEST_PROMTOOL=$prometheus_3/usr/bin/promtool
    export TALLYLINE_TEST_PORTS=$((first_port + 10))-$((first_port + 199))
    export TMPDIR=$servers/tmp
    # Most tests wait for servers. A PostgreSQL on a disk has less time for each.
    export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$([[ -n ${TALLYLINE_TEST_POSTGRES_IN_MEMORY:-} ]] && printf 8 || printf 6)}
}

# Becomes cargo, for run_beside_servers. RUSTC_BOOTSTRAP lets test binaries print the duration of each
# test. Cargo does not get it, because it would then rebuild everything. Cargo ends with this script,
# even if the script is killed. Its tests end with it, and the processes of a test end with the test.
cargo_beside_servers() {
    local host
    host=$(rustc -vV | sed -n 's/^host: //p')
    export "CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$host")_RUNNER=setpriv --pdeathsig=KILL env RUSTC_BOOTSTRAP=1"
    exec setpriv --pdeathsig=KILL cargo "$@"
}

# Runs a command beside the servers, and reports a server that ended meanwhile.
run_beside_servers() {
    local result=0
    set -m
    "$@" </dev/null &
    command_pid=$!
    set +m
    wait "$command_pid" || result=$?
    command_pid=
    kill -0 "$postgres_pid" 2>/dev/null || fail "PostgreSQL ended meanwhile: $(tail -n 20 "$servers/postgres.log")"
    kill -0 "$kafka_pid" 2>/dev/null || fail "Kafka ended meanwhile: $(tail -n 20 "$servers/kafka.log")"
    return "$result"
}

stop_servers() {
    trap '' INT TERM HUP
    local pid
    if [[ -n $command_pid ]]; then
        kill -TERM -- "-$command_pid" 2>/dev/null || true
        wait "$command_pid" 2>/dev/null || true
    fi
    # Stop both immediately, because their data is discarded.
    [[ -z $postgres_pid ]] || kill -QUIT "$postgres_pid" 2>/dev/null || true
    [[ -z $kafka_pid ]] || kill -KILL "$kafka_pid" 2>/dev/null || true
    for pid in $postgres_pid $kafka_pid; do
        wait "$pid" 2>/dev/null || true
    done
    [[ -z $servers ]] || rm -rf "$(in_memory "$servers")" "$servers"
}
