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

# Every process of the cluster shows the token to every other. Without this mode Ray lets in whoever comes.
use_token() {
  [ "${RAY_AUTH_MODE:-token}" = token ] ||
    fail "RAY_AUTH_MODE is '$RAY_AUTH_MODE'; clusters of these scripts have a token: unset it"
  export RAY_AUTH_MODE=token
  TOKEN_FILE=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
}

# need_token: after use_token, where a token must have come from the head.
need_token() {
  [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "$TOKEN_FILE" ] ||
    fail "the cluster's token is missing: copy ~/.ray/auth_token of the head's user to $TOKEN_FILE (cluster/README.md)"
}
