#!/usr/bin/env bash
# The job on this machine's GPU with Docker, started again as its exit codes ask (restart.sh, in this directory).
#
#   cp cloud/job.env.example job.env    # fill it in
#   cloud/docker/run.sh job.env
#
# SCRATCH is a Docker volume, or a directory that user 10001 or group 0 may write to. It holds model, data and
# checkpoints in the making; nothing in it is needed again.
set -euo pipefail

variables=${1:?usage: $0 job.env [argument of the job ...]}
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Docker ends the container STOP_SECONDS after `docker stop`; the job has to end before that. When the machine shuts
# down, the Docker daemon gives 15 seconds unless its shutdown-timeout says otherwise: then leave this at 15.
stop=${STOP_SECONDS:-15}

exec "$here/restart.sh" docker run --rm \
  --gpus all \
  --read-only \
  --cap-drop ALL \
  --security-opt no-new-privileges \
  --pids-limit 4096 \
  --shm-size 1g \
  --stop-timeout "$stop" \
  --mount "type=volume,source=${SCRATCH:-finetune-job-scratch},target=/scratch" \
  --env-file "$variables" \
  --env "TUNE_GRACE_SECONDS=$stop" \
  "${IMAGE:-finetune-job:0.1.0}" "$@"
