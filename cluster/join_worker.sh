#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat << TEXT
Join this host to a Ray cluster.

usage: cluster/join_worker.sh [--stay] HEAD_ADDRESS

  --stay        go on running, and join again whenever this host lost the cluster; without it, return once it is in
  HEAD_ADDRESS  host or host:port of the head, as start_head.sh printed it (default port $PORT)

The head's token must be here: in ~/.ray/auth_token, or in RAY_AUTH_TOKEN (cluster/README.md).

Leave again with: .venv/bin/ray stop
TEXT
}

stay=
if [ "${1:-}" = --stay ]; then stay=yes; shift; fi
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
use_token
need_token
# Ray itself would try for ten minutes. This names the reason in 20 seconds.
python -m skyrl.crew.door "$address"
[ -n "$stay" ] || exec ray start --address="$address"
# A host that the head has missed for too long is no member any more, and its Ray ends.
while :; do
  ray start --address="$address" --block || true
  echo "this host lost the cluster at $address; joining again when it answers" >&2
  sleep 5
  until python -m skyrl.crew.door "$address"; do sleep 10; done
done
