#!/usr/bin/env bash
# Train with several processes on this machine, and start them again when they crash or are stopped.
#
#   launch/local.sh --processes=N [OPTIONS] COMMAND...       N processes, such as on CPUs
#   launch/local.sh --gpus=0,1,2,3 [OPTIONS] COMMAND...      one process for each of these GPUs
#
#   launch/local.sh --gpus=0,1 python -m allattn train --config=configs/enwik8_small.py --workdir=runs/small
#
# --port=PORT        of the first process, which the others meet at; a free one if left out
# --grace=SECONDS    (60) that the others may take to end after one has ended in failure; then they are killed
# --tries=N          (5) crashes in a row, after which it gives up
# --delay=SECONDS    (10) before the second attempt; doubles with every further one
# --dry-run          print the commands, start nothing
#
# When one process fails, all are stopped, and all start again. SIGTERM and Ctrl-C are passed on to every process; when
# these have saved their state and ended, so does this script, with their exit code. When it is killed by force, they get
# SIGTERM where there is `setpriv` (util-linux). Needs bash 5.
set -euo pipefail
# shellcheck source=launch/retry.sh
source "$(dirname "${BASH_SOURCE[0]}")/retry.sh"

processes='' gpus='' port='' grace=60
while [[ ${1-} == --* ]]; do
  case $1 in
    --processes=*) processes=$(number "$1" 1) ;;
    --gpus=*)
      gpus=${1#*=}
      [[ $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || mistake "--gpus: expected numbers of GPUs, such as 0,1,2, found '$gpus'"
      ;;
    --port=*) port=$(number "$1" 1 65535) ;;
    --grace=*) grace=$(number "$1") ;;
    *) shared_option "$1" ;;
  esac
  shift
done
((BASH_VERSINFO[0] >= 5)) || mistake "expected bash 5 or newer, found $BASH_VERSION"
[[ ${processes:+one}${gpus:+one} == one ]] || mistake "expected either --processes=N or --gpus=0,1,..., found both or neither"
(($#)) || mistake "expected a command after the options, found none"
[[ $dry_run || $(type -P -- "$1") ]] || mistake "expected a program on the PATH, found '$1'"
IFS=, read -ra gpus <<<"$gpus"
processes=${processes:-${#gpus[@]}}
guard=(setpriv --pdeathsig=TERM) # SIGTERM to what it starts, when this script is gone
"${guard[@]}" true 2>/dev/null || guard=()

free_port() {
  local found=$((20000 + RANDOM % 10000))
  while (: <"/dev/tcp/localhost/$found") 2>/dev/null; do found=$((found + 1)); done
  echo "$found"
}

declare -A running=() # number of the process: its id, which is also its group's

signal() {
  local group
  for group in "${running[@]}"; do kill -s "$1" -- "-$group" 2>/dev/null || true; done
}

# Start one process in the background, or print it.
start() {
  local words=("${command[@]}" --coordinator="localhost:$port" --processes="$processes" --process="$1")
  ((${#gpus[@]} == 0)) || words=(env CUDA_VISIBLE_DEVICES="${gpus[$1]}" "${words[@]}")
  [[ ! $dry_run ]] || { run "${words[@]}" && return; }
  set -m # a group of its own, out of the terminal's reach
  (exec "${guard[@]}" "${words[@]}" </dev/null) &
  running[$1]=$!
  set +m
}

# All processes, once; returns the exit code of the first that failed, or 2 if any ended so.
attempt() {
  local number
  for ((number = 0; number < processes; number++)); do start "$number"; done
  watch 3>&2 2>/dev/null # without bash's own remarks on what was killed
}

# Wait until all have ended, and stop the others when one has failed; messages go to descriptor 3.
watch() {
  local number code failed=0 deadline=0
  while ((${#running[@]} && (!failed || SECONDS <= deadline))); do
    sleep 0.5 || true
    for number in "${!running[@]}"; do
      ! kill -0 "${running[$number]}" || continue
      code=0
      wait "${running[$number]}" || code=$?
      unset "running[$number]"
      ((code && !failed || code == 2 && failed != 2)) || continue # 2 is a mistake, whatever its loss did to the others
      say "process $number ended with exit code $code" 2>&3
      failed=$code deadline=$((SECONDS + grace))
      ((code == 75)) || signal TERM # at 75 the others are about to end by themselves
    done
  done
  signal KILL
  wait || true
  running=()
  return "$failed"
}

command=("$@")
port=${port:-$(free_port)}
trap 'leaving=1; signal TERM' TERM INT HUP
trap 'signal KILL' EXIT
retry attempt
