#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat << TEXT
Submit a training run to a Ray cluster and follow its output.

usage: cluster/submit.sh [--no-wait] [key=value …]

  --no-wait   return once the job is accepted; follow it with: .venv/bin/ray job logs --follow JOB
  key=value   settings, as for python -m skyrl.launch

Environment:
  RAY_API_SERVER_ADDRESS  where jobs are submitted (default http://127.0.0.1:8265, the head's dashboard)

The head's token must be here: in ~/.ray/auth_token, or in RAY_AUTH_TOKEN (cluster/README.md).
TEXT
}

options=()
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --no-wait) options+=(--no-wait); shift ;;
esac
for argument in "$@"; do
  [[ "$argument" == *=* ]] || fail "got '$argument'; allowed: key=value; see --help"
done

find_ray
use_token
need_token
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
[[ "$RAY_API_SERVER_ADDRESS" =~ ^https?:// ]] ||
  fail "RAY_API_SERVER_ADDRESS is '$RAY_API_SERVER_ADDRESS'; allowed: an http:// or https:// address"
# The head runs the job in this same folder, so relative paths mean the same there. Ray sets RAY_ADDRESS in the job,
# and skyrl joins that cluster.
exec ray job submit "${options[@]}" -- bash -c 'cd "$0" && exec python -m skyrl.launch "$@"' "$ROOT" "$@"
