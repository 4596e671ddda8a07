#!/usr/bin/env bash
# Train on a Cloud TPU slice: install one commit on all its workers, run, bring the logs back, start again if needed.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --project=PROJECT [OPTIONS] COMMAND...
#
#   launch/tpu_pod.sh --name=mine --zone=us-west4-a --project=$PROJECT --type=v5litepod-16 \
#       --runtime=v2-alpha-tpuv5-lite python -m allattn train --config=configs/enwik8_large.py --workdir=gs://$BUCKET/large
#
# --commit=COMMIT    (HEAD) of this repository to install, without what is not committed; it is sent from here, the
#                    workers need no access to it
# --type=TYPE        and --runtime=VERSION: create the slice if there is none, and anew when it was preempted;
#                    without them it must be there
# --spot             create it as a spot slice
# --log=FILE         (NAME.log) that what all workers print is added to, each line after its worker's name
# --tries=N          (5) crashes in a row, after which it gives up
# --delay=SECONDS    (10) before the second attempt; doubles with every further one
# --dry-run          print the commands, start nothing
#
# SIGTERM and Ctrl-C are passed on to the workers; when these have saved their state and ended, so does this script. The
# slice is never deleted but when it was preempted. Needs gcloud, and the key it makes in the agent:
# ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/retry.sh
source "$here/retry.sh"

name='' zone='' project='' commit='' type='' runtime='' spot='' log=''
while [[ ${1-} == --* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --commit=*) commit=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=--spot ;;
    --log=*) log=${1#*=} ;;
    *) shared_option "$1" ;;
  esac
  shift
done
[[ $name && $zone && $project ]] || mistake "expected --name, --zone and --project, found '$name', '$zone', '$project'"
[[ ${type:+both} == "${runtime:+both}" ]] || mistake "expected --type and --runtime together, found only one of them"
(($#)) || mistake "expected a command after the options, found none"
sha=$(git -C "$here" rev-parse --verify --quiet "${commit:-HEAD}^{commit}") ||
  mistake "--commit: expected a commit of this repository, found '${commit:-HEAD}'"
[[ $commit || ! $(git -C "$here/.." status --porcelain) ]] ||
  say "what is not committed is not sent: the workers get HEAD, ${sha:0:12}"
[[ $dry_run || $(type -P gcloud) ]] || mistake "expected gcloud on the PATH, found none"

folder=allattn-${sha:0:12}
archive=${TMPDIR:-/tmp}/$folder.tar
worker=$folder/launch/tpu_worker.sh
train="$worker train $(printf '%q ' "$@" | sed 's/ $//')"
tpu=(gcloud compute tpus tpu-vm)
place=(--zone="$zone" --project="$project")

on_workers() { run "${tpu[@]}" ssh "$name" "${place[@]}" --worker=all --command="$1"; }

create() {
  run "${tpu[@]}" create "$name" "${place[@]}" --accelerator-type="$type" --version="$runtime" ${spot:+"$spot"}
}

# What gcloud says of mistakes that no further attempt mends; that it reaches nobody is none of them.
refusals='NOT_FOUND|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT'
refusals+='|invalid_grant|Reauthentication|active account selected|valid project ID'

# What gcloud said when it failed: a mistake, or a crash.
failed() {
  local line=${1#*ERROR: }
  [[ ! $1 =~ $refusals ]] || mistake "gcloud refuses slice $name in $zone of $project: ${line%%$'\n'*}"
  say "$1"
  return 1
}

# Make sure that there is a slice that can be used.
ensure() {
  local told found=none
  if told=$("${tpu[@]}" describe "$name" "${place[@]}" --format='value(state)' 2>&1); then
    found=${told##*$'\n'} # behind what gcloud may warn of
    [[ $found == PREEMPTED || $found == TERMINATED ]] || return 0
  elif [[ $told != *NOT_FOUND* ]]; then
    failed "$told" || return
  fi
  [[ $type ]] || mistake "--name=$name: expected a slice, or --type and --runtime to make it, found $found"
  [[ $found == none ]] || "${tpu[@]}" delete "$name" "${place[@]}" --quiet || return
  told=$(create 2>&1) || failed "$told" || return
  echo "$told"
}

# Send the commit to all workers and install it there.
send() {
  run git -C "$here/.." archive --prefix="$folder/" --output="$archive" "$sha" &&
    run "${tpu[@]}" scp "$archive" "$name:" "${place[@]}" --worker=all &&
    on_workers "tar -xf $folder.tar" && on_workers "$worker install"
}

# What an attempt would do.
plan() {
  [[ ! $type ]] || { echo "# if there is no slice $name, or after it was preempted:" && create; }
  send && on_workers "$train"
}

stop() { on_workers "$worker stop"; }

attempt() {
  [[ ! $dry_run ]] || { plan; return; }
  ensure && send || return
  [[ ! $leaving ]] || return 1
  set -m # gcloud in a process group of its own, out of the terminal's reach
  on_workers "$train" &
  training=$!
  set +m
  local code
  while true; do # a signal ends `wait`, not the training
    code=0
    wait "$training" || code=$?
    kill -0 "$training" 2>/dev/null || break
  done
  training=
  return "$code"
}

training=
[[ $dry_run ]] || exec > >(tee --append --ignore-interrupts "${log:-$name.log}") 2>&1
trap 'leaving=1; [[ ! $training ]] || stop || true' TERM INT HUP
retry attempt
