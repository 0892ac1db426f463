#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat << TEXT
Join this host to a Ray cluster.

usage: cluster/join_worker.sh HEAD_ADDRESS

  HEAD_ADDRESS  host or host:port of the head, as start_head.sh printed it (default port $PORT)

Leave again with: .venv/bin/ray stop
TEXT
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "") usage >&2; exit 1 ;;
  -*) fail "unknown argument '$1'; see --help" ;;
esac
[ $# -eq 1 ] || fail "got $# arguments; needed: HEAD_ADDRESS alone; see --help"
address=$1
[[ "$address" =~ ^[A-Za-z0-9._-]+(:[0-9]+)?$ ]] || fail "HEAD_ADDRESS is '$address'; allowed: host or host:port"
if [[ "$address" == *:* ]]; then check_port "${address##*:}"; else address="$address:$PORT"; fi

find_ray
exec ray start --address="$address"
