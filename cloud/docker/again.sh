#!/usr/bin/env bash
# Runs a command that ends like the job, and runs it again where the exit code says that this may help.
#
#   again.sh docker run ... finetune-job:0.1.0
#   again.sh docker compose -f compose.yaml run --rm train
#
# 75 (interrupted) is run again at once and never counts. 74 (storage) and codes that nobody foresaw (1, 137, Docker's
# own 125 to 127) count: at most TRIES of them, PAUSE_SECONDS apart. All other codes end the loop: the job would end
# the same way again. SIGTERM and SIGINT are passed on, and then nothing is started any more.
set -uo pipefail

tries=${TRIES:-5}
pause=${PAUSE_SECONDS:-30}
child=""
asked=""

# Called by the trap.
# shellcheck disable=SC2329
pass_on() {
  asked=yes
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap pass_on TERM INT

[ "$#" -gt 0 ] || { echo "usage: $0 command [argument ...]" >&2; exit 78; }

failures=0
while true; do
  "$@" &
  child=$!
  # A trap ends `wait` early with a code above 128: wait on until the command itself has ended.
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=""

  case $code in
    0 | 65 | 70 | 76 | 77 | 78) exit "$code" ;;
    75) ;;
    *) failures=$((failures + 1)) ;;
  esac
  if [ -n "$asked" ]; then exit "$code"; fi
  if [ "$failures" -ge "$tries" ]; then
    echo "$0: exit code $code, try $failures of $tries: giving up" >&2
    exit "$code"
  fi
  echo "$0: exit code $code: starting again ($failures of $tries failures)" >&2
  if [ "$code" -ne 75 ]; then
    sleep "$pause" &
    child=$!
    wait "$child"
    child=""
    if [ -n "$asked" ]; then exit "$code"; fi
  fi
done
