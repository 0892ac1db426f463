# Sourced by the scripts beside it, not run.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PORT=6379

fail() {
  echo "error: $*" >&2
  exit 1
}

# Put the project's environment first, and make sure that there is a Ray.
find_ray() {
  if [ -x "$ROOT/.venv/bin/ray" ]; then
    # Jobs inherit this PATH from the Ray that is started here, so their "python" is the environment's.
    export PATH="$ROOT/.venv/bin:$PATH"
  fi
  command -v ray > /dev/null || fail "no ray in $ROOT/.venv and none on PATH; run: make setup"
  export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
}

# check_port VALUE
check_port() {
  [[ "$1" =~ ^[0-9]{1,5}$ ]] && [ "$1" -ge 1 ] && [ "$1" -le 65535 ] || fail "port is '$1'; allowed: 1 to 65535"
}
