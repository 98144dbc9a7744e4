# What demo, test and the tools share: where things are, headings, and steps that keep their output in a log. Sourced by bash scripts.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export HOME=${HOME:-$(cd ~ && pwd)}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mla
logs=$root/build/logs
jobs=$(nproc)
failed=0  # steps that failed
mkdir -p "$logs"
cd "$root"

bold='' dim='' red='' plain=''
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' plain=$'\e[0m'; fi

say() { printf '%s\n' "$*"; }
heading() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
die() { printf '%s%s%s\n' "$red" "$*" "$plain" >&2; exit 1; }
elapsed() { printf '%dm%02ds' $((SECONDS - $1 >= 60 ? (SECONDS - $1) / 60 : 0)) $(((SECONDS - $1) % 60)); }

# usage FILE: prints the comment a script opens with.
usage() { sed -n '2,/^[^#]/ { s/^# \{0,1\}//p }' "$1"; }

# Shows the last line of a log while a step runs; on a terminal only.
ticker=
watch_log() {
  [[ -t 1 ]] || return 0
  while sleep 1; do
    printf '\r  %-36s %s%-.60s%s\e[K' "$1" "$dim" "$(tail -n 1 "$2" | tr -d '\r')" "$plain"
  done &
  ticker=$!
}
unwatch() {
  [[ -n $ticker ]] || return 0
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  ticker=
  printf '\r\e[K'
}
trap unwatch EXIT

# step NAME COMMAND...: runs the command with its output in a log and prints the time it took. If it fails, prints the log's end and
# how to run it again, counts it in `failed` and returns its status.
step() {
  local name=$1 log=$logs/${1//[^a-zA-Z0-9]/-}.log begin=$SECONDS status=0
  shift
  [[ -t 1 ]] || printf '  %-36s ' "$name"
  watch_log "$name" "$log"
  "$@" >"$log" 2>&1 </dev/null || status=$?
  unwatch
  [[ ! -t 1 ]] || printf '  %-36s ' "$name"
  if ((status == 0)); then
    say "$(elapsed "$begin")"
    return 0
  fi
  failed=$((failed + 1))
  say "${red}failed after $(elapsed "$begin"), exit status $status$plain"
  say "---- the end of $log"
  tail -n "${MLA_LOG_LINES:-60}" "$log"
  say "---- again: cd $(printf '%q' "$root") && $(printf '%q ' "$@")"
  return "$status"
}
