#!/usr/bin/env bash
# Runs a command that ends like the job, and runs it again where the exit code says that this may help.
#
#   restart.sh docker run ... finetune-job:0.1.0
#   restart.sh docker compose -f compose.yaml run --rm train
#
# 75 (interrupted) is run again after a second and never counts. 74 (storage) and unexpected codes (1, 137, Docker's
# own 125 to 127) count: at most TRIES of them, PAUSE_SECONDS apart. All other codes end the loop: the job would end
# the same way again. SIGTERM and SIGINT are passed on, and then nothing is started any more.
set -uo pipefail

[ "$#" -gt 0 ] || { echo "usage: $0 command [argument ...]" >&2; exit 78; }

tries=${TRIES:-5}
pause=${PAUSE_SECONDS:-30}
for number in "TRIES=$tries" "PAUSE_SECONDS=$pause"; do
  [[ ${number#*=} =~ ^[0-9]+$ ]] || { echo "$0: $number is not a whole number" >&2; exit 78; }
done
child=""
signals=0
code=75

# Called by the trap.
# shellcheck disable=SC2329
pass_on() {
  signals=$((signals + 1))
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap pass_on TERM INT

# Sets `code` to the command's exit code. A signal ends `wait` early, with a code of its own: then it waits again.
run() {
  local seen=$signals later
  "$@" &
  child=$!
  if [ "$signals" -gt 0 ]; then kill -TERM "$child" 2>/dev/null; fi # it came before there was a child
  wait "$child"
  code=$?
  while [ "$signals" -gt "$seen" ]; do
    seen=$signals
    wait "$child" 2>/dev/null
    later=$?
    if [ "$later" -ne 127 ]; then code=$later; fi # 127: there is nothing left to wait for
  done
  child=""
}

failures=0
while [ "$signals" -eq 0 ]; do
  run "$@"
  case $code in
    0 | 65 | 70 | 76 | 77 | 78) exit "$code" ;;
    75) ;;
    *) failures=$((failures + 1)) ;;
  esac
  if [ "$signals" -gt 0 ]; then break; fi
  if [ "$failures" -ge "$tries" ]; then
    echo "$0: exit code $code, failure $failures of $tries: giving up" >&2
    break
  fi
  echo "$0: exit code $code, $failures of $tries failures: starting again" >&2
  last=$code
  if [ "$code" -eq 75 ]; then run sleep 1; else run sleep "$pause"; fi
  code=$last
done
exit "$code"
