#!/usr/bin/env bash
# One worker of a Cloud TPU slice: what launch/tpu_pod.sh has each of them do.
#
#   launch/tpu_worker.sh [--dry-run] install        an environment for this copy of the repository, once
#   launch/tpu_worker.sh [--dry-run] train COMMAND...
#   launch/tpu_worker.sh [--dry-run] stop           SIGTERM to the command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/retry.sh
source launch/retry.sh

while [[ ${1-} == --* ]]; do
  shared_option "$1"
  shift
done

# The machine's own Python may be too old, so uv brings one.
install() {
  [[ ! -e .installed ]] || return 0
  run python3 -m pip install --quiet --user 'uv>=0.8,<1'
  run python3 -m uv venv --quiet --clear --python=3.12 .venv
  run python3 -m uv pip install --quiet --python=.venv/bin/python --editable '.[tpu,gcs]'
  run touch .installed
}

# The lock waits for what an earlier attempt, whose connection broke, may have left running.
train() {
  PATH=$PWD/.venv/bin:$PATH
  # shellcheck disable=SC2016 # the inner shell's variables
  run flock --wait=600 ../allattn.lock bash -c 'echo $$ >../allattn.pid; exec "$@"' - "$@" 2>&1 |
    sed --unbuffered "s/^/$(hostname): /"
}

case ${1-} in
  install) install ;;
  train) train "${@:2}" ;;
  stop) run kill -s TERM "$(cat ../allattn.pid)" ;;
  *) mistake "expected install, train or stop, found '${1-}'" ;;
esac
