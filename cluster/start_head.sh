#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat << TEXT
Start the head of a Ray cluster on this host.

usage: cluster/start_head.sh [--address ADDRESS] [--port PORT] [--dashboard-host HOST] [--dashboard-port PORT]
                             [--autoscaling-config FILE]

  --address ADDRESS      this host's IP address on the network of the cluster (default: that of the default route)
  --port PORT            port that workers join at (default $PORT)
  --dashboard-host HOST  address that the dashboard and job submission listen on (default 127.0.0.1: this host only)
  --dashboard-port PORT  its port (default 8265)
  --autoscaling-config FILE  what Ray's launcher starts the workers by (cluster/ray_up.yaml)

Whoever joins or submits must show the token in ~/.ray/auth_token, which is made if there is none; cluster/README.md
says how it comes to the other hosts, and what it does not protect.

Stop it with: .venv/bin/ray stop
TEXT
}

# The address that packets to elsewhere leave from; none is sent.
own_address() {
  python3 -c 'import socket as s
u = s.socket(s.AF_INET, s.SOCK_DGRAM); u.connect(("192.0.2.1", 9)); print(u.getsockname()[0])' 2> /dev/null
}

address=
host=127.0.0.1
dashboard=8265
more=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --address | --port | --dashboard-host | --dashboard-port | --autoscaling-config)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case "$1" in
        --address) address=$2 ;;
        --port) check_port "$2"; PORT=$2 ;;
        --dashboard-host) host=$2 ;;
        --dashboard-port) check_port "$2"; dashboard=$2 ;;
        --autoscaling-config) more+=("--autoscaling-config=$2") ;;
      esac
      shift 2
      ;;
    *) fail "unknown argument '$1'; see --help" ;;
  esac
done

find_ray
use_token
if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  if [ ! -s "$TOKEN_FILE" ]; then
    mkdir -p "$(dirname "$TOKEN_FILE")"
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$TOKEN_FILE")
  fi
  chmod 600 "$TOKEN_FILE" # Ray itself makes it readable for every user of the host
fi
[ -n "$address" ] || address=$(own_address) || fail "this host has no default route; say its address: --address ADDRESS"

# A host that is lost is missed after about 20 s instead of 65: three questions in a row, 2 s apart, without an answer
# within 5 s. A host that is only busy answers in less.
export RAY_health_check_period_ms="${RAY_health_check_period_ms:-2000}"
export RAY_health_check_timeout_ms="${RAY_health_check_timeout_ms:-5000}"
export RAY_health_check_failure_threshold="${RAY_health_check_failure_threshold:-3}"
# What "ray job stop" waits before it kills: a run finishes its step and saves.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-600}"
ray start --head --node-ip-address="$address" --port="$PORT" --dashboard-host="$host" \
  --dashboard-port="$dashboard" "${more[@]}"
echo
if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  echo "Once for every other host:  ssh HOST 'umask 077; mkdir -p ~/.ray; cat > ~/.ray/auth_token' < $TOKEN_FILE"
fi
echo "On every other host:        cluster/join_worker.sh $address:$PORT"
echo "Then, on this host:         cluster/submit.sh key=value …"
