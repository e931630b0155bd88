#!/usr/bin/env bash
# Makes one Ray cluster of machines of your own that ssh reaches, from a checkout on one of them or elsewhere.
#
#   cluster/machines.sh up HEAD WORKER...       installs this commit on them and starts Ray; again after changes: running jobs end
#   cluster/machines.sh down HEAD WORKER...     ends what it started
#
# HEAD and WORKER as ssh takes them, ubuntu@10.0.0.1 or a name of ~/.ssh/config. At HEAD's address the others look for it, or at
# RAYCHAT_HEAD_IP. They need Python 3.11 or newer with venv, and a C compiler. Variables RAYCHAT_*, NCCL_* and GLOO_* that are set here
# hold on all machines, for all jobs, until others are given: RAYCHAT_STORAGE_PATH=s3://bucket/runs, or, without an object store,
# RAYCHAT_BASE_DIR=/shared/raychat, a folder that all share.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TOKEN=$HOME/.ray/auth_token
SETTINGS=$(set | grep -E '^(RAYCHAT|NCCL|GLOO)_[A-Z_]+=' || true)

fail() {
  echo "machines.sh: $*" >&2
  exit 1
}

on() { # MACHINE COMMAND; never asks for a password
  ssh -o BatchMode=yes -o ConnectTimeout=20 "$1" "$2"
}

each() { # FUNCTION MACHINE...: on all at the same time; those that fail say what they said
  local function=$1 machines=("${@:2}") jobs=() i=0 failed=0
  for i in "${!machines[@]}"; do
    "$function" "${machines[$i]}" >"$LOGS/$i" 2>&1 &
    jobs+=("$!")
  done
  for i in "${!machines[@]}"; do
    wait "${jobs[$i]}" || { failed=1 && sed "s/^/${machines[$i]}: /" "$LOGS/$i" >&2; }
  done
  return "$failed"
}

install() {
  git -C "$ROOT" archive --format=tar.gz HEAD |
    on "$1" 'mkdir -p raychat && rm -rf raychat/raychat raychat/jobs raychat/cluster && tar -xz -C raychat'
  on "$1" 'umask 077 && mkdir -p .ray && cat >.ray/auth_token' <"$TOKEN"
  [ -z "$SETTINGS" ] || on "$1" 'cat >raychat.env' <<<"$SETTINGS"
  on "$1" 'raychat/cluster/node.sh setup'
}

start_head() { on "$1" 'raychat/cluster/node.sh ray start --head --port=6379 --dashboard-host=127.0.0.1'; }
start_worker() { on "$1" "raychat/cluster/node.sh ray start --address=$ADDRESS:6379"; }
stop() { on "$1" '[ ! -e raychat/cluster/node.sh ] || raychat/cluster/node.sh stop'; }

case ${1:-}:$# in
  up:1 | down:1 | :*) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
  up:* | down:*) ;;
  *) fail "'$1' is neither up nor down" ;;
esac
HEAD=$2 WORKERS=("${@:3}")
ADDRESS=${RAYCHAT_HEAD_IP:-${HEAD#*@}}
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
if [ "$1" = down ]; then
  each stop "${WORKERS[@]}"
  each stop "$HEAD" # which others would look for meanwhile
  exit
fi
[ -s "$TOKEN" ] || fail "there is no token in $TOKEN: make one with 'ray get-auth-token --generate'"
git -C "$ROOT" diff --quiet HEAD || echo "machines.sh: what is not committed is left out"
each install "$HEAD" "${WORKERS[@]}"
each start_head "$HEAD"
each start_worker "${WORKERS[@]}"
echo "machines.sh: $((1 + ${#WORKERS[@]})) machines run Ray. Its dashboard: ssh -L 8265:127.0.0.1:8265 $HEAD, then http://localhost:8265"
