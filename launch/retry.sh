# shellcheck shell=bash
# What the launchers share: how often an attempt is made again, and the options that say so. Sourced, not run.
#
# The exit codes are those of `allattn train`:
#   0   done
#   2   a mistake in the command or the configuration: never tried again
#   75  stopped with the state saved: started again after DELAY seconds, however often
#   130 stopped by Ctrl-C: somebody wants it to stop, so it is not started again
#   *   a crash: tried again after DELAY seconds, twice as long each time, until TRIES attempts in a row have crashed

tries=5
delay=10
dry_run=
leaving= # not empty: what ends now is not started again
program=$(basename "$0")

say() { printf '%s: %s\n' "$program" "$*" >&2; }

mistake() {
  say "$*"
  exit 2
}

# The options that every launcher has; --help prints the comment at the launcher's top.
shared_option() {
  case $1 in
    --tries=*) tries=$(number "$1" 1) ;;
    --delay=*) delay=$(number "$1") ;;
    --dry-run) dry_run=1 ;;
    --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
    *) mistake "unknown option $1; see --help; the command comes after the options" ;;
  esac
}

# The value of --NAME=VALUE, a whole number in the range of the second and third argument.
number() {
  local value=${1#*=} least=${2:-0} most=${3:-999999}
  if [[ ! $value =~ ^[0-9]{1,6}$ ]] || ((10#$value < least || 10#$value > most)); then
    mistake "${1%%=*}: expected a whole number from $least to $most, found '$value'"
  fi
  echo "$((10#$value))"
}

# Do a command, or print it.
run() {
  if [[ $dry_run ]]; then printf '%q ' "$@" | sed 's/ $/\n/'; else "$@"; fi
}

# Wait, but not longer than until a signal.
pause() {
  local left=$1
  while ((left-- > 0)) && [[ ! $leaving ]]; do sleep 1 || true; done
}

# Make an attempt, a function and its arguments, until it is done.
retry() {
  local crashes=0 wait=$delay code
  if [[ $dry_run ]]; then
    "$@"
    echo "# a crash: again after $delay s, doubling, up to $tries attempts in a row; exit code 2: not again"
    return
  fi
  while true; do
    code=0
    "$@" || code=$?
    [[ $code != 0 && $code != 2 && $code != 130 && ! $leaving ]] || return "$code"
    if ((code == 75)); then
      crashes=0 wait=$delay
      say "stopped with the state saved (exit code 75); starting again in $wait s"
    elif ((++crashes < tries)); then
      say "attempt $crashes of $tries ended with exit code $code; again in $wait s"
    else
      say "gave up after $crashes attempts in a row; the last one ended with exit code $code"
      return "$code"
    fi
    pause "$wait"
    [[ ! $leaving ]] || return "$code"
    ((code == 75)) || wait=$((wait * 2))
  done
}
