#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat << TEXT
Start the head of a Ray cluster on this host.

usage: cluster/start_head.sh [--port PORT] [--dashboard-host HOST] [--dashboard-port PORT]

  --port PORT            port that workers join at (default $PORT)
  --dashboard-host HOST  address that the dashboard and job submission listen on (default 127.0.0.1: this host
                         only. They have no password; open them to a trusted network at most)
  --dashboard-port PORT  its port (default 8265)

Stop it with: .venv/bin/ray stop
TEXT
}

host=127.0.0.1
dashboard=8265
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --port | --dashboard-host | --dashboard-port)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case "$1" in
        --port) check_port "$2"; PORT=$2 ;;
        --dashboard-host) host=$2 ;;
        --dashboard-port) check_port "$2"; dashboard=$2 ;;
      esac
      shift 2
      ;;
    *) fail "unknown argument '$1'; see --help" ;;
  esac
done

find_ray
ray start --head --port="$PORT" --dashboard-host="$host" --dashboard-port="$dashboard"
echo
echo "On every other host:  cluster/join_worker.sh $(hostname -I 2> /dev/null | awk '{ print $1 }'):$PORT"
echo "Then, on this host:   cluster/submit.sh key=value …"
