#!/usr/bin/env bash
# One run on nodes of a Slurm cluster:  sbatch cluster/slurm.sh key=value …      (from the project's folder)
#
# The folder must be on a file system that all nodes share. Options of sbatch on the command line go before the ones
# below:  sbatch --nodes=5 --time=48:00:00 cluster/slurm.sh key=value …
#
# Ten minutes before the time is up, or at  scancel --batch --signal=TERM JOB , the run finishes its step, saves and
# ends; submit it again with resume=auto. A job that Slurm itself requeues goes on from its newest checkpoint.
# Tried against stand-ins of Slurm's commands, never on a Slurm cluster.
#
#SBATCH --job-name=skyrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --output=skyrl-%j.log
#SBATCH --open-mode=append
set -euo pipefail

# sbatch runs a copy of this file, so the folder is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?not in a Slurm job; use: sbatch cluster/slurm.sh key=value …}"
[ -x cluster/start_head.sh ] || { echo "error: call sbatch in the project's folder" >&2; exit 1; }
for argument in "$@"; do
  [[ "$argument" == *=* ]] || { echo "error: got '$argument'; allowed: key=value" >&2; exit 1; }
done
WAIT=${SKYRL_SLURM_WAIT:-300} # seconds for all nodes to join

# A folder of this job that no other user can read: the token, and who has joined.
umask 077
private="$PWD/outputs/.slurm-$SLURM_JOB_ID"
rm -rf "$private"
mkdir -p "$private"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/auth_token"
export PATH="$PWD/.venv/bin:$PATH"

workers= run=
end() {
  trap - EXIT TERM
  [ -z "$workers" ] || kill "$workers" 2> /dev/null || true
  ray stop > /dev/null 2>&1 || true
  rm -rf "$private"
}
trap end EXIT
trap '[ -z "$run" ] || kill -TERM "$run" 2> /dev/null || true' TERM

# This script runs on the first node: the head. Two jobs on one node do not meet at one port.
port=$((20000 + SLURM_JOB_ID % 10000))
address=$(hostname -I | awk '{ print $1 }')
cluster/start_head.sh --address "$address" --port "$port"

others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  # A step ends with its command, and takes Ray with it: so it stays.
  srun --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="${SLURMD_NODENAME:-$(hostname -s)}" \
    --kill-on-bad-exit=1 --cpu-bind=none \
    bash -c 'cluster/join_worker.sh "$0" && touch "$1/joined-$SLURM_PROCID" && exec sleep infinity' \
    "$address:$port" "$private" &
  workers=$!
  for ((second = 0; ; second++)); do
    joined=$(find "$private" -name 'joined-*' | wc -l)
    [ "$joined" -lt "$others" ] || break
    kill -0 "$workers" 2> /dev/null || { echo "error: a node could not join; its message is above" >&2; exit 1; }
    [ "$second" -lt "$WAIT" ] || { echo "error: $joined of $others nodes joined within $WAIT s" >&2; exit 1; }
    sleep 1
  done
fi

settings=("$@")
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || settings+=(resume=auto)
RAY_ADDRESS="$address:$port" python -m skyrl.launch "${settings[@]}" &
run=$!
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do # the wait was ended by a signal; the run saves
  code=0
  wait "$run" || code=$?
done
exit "$code"
