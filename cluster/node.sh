#!/usr/bin/env bash
# One machine of a Ray cluster: installs raychat on it, runs Ray with the node watcher beside it, and stops what it started.
#
#   cluster/node.sh setup                                      raychat and its dependencies, into .venv of this checkout
#   cluster/node.sh ray start --head --port=6379               starts Ray with these options, and the watcher
#   cluster/node.sh ray start --address=HEAD:6379              the same on a machine that joins
#   cluster/node.sh ray status                                 any other command of Ray's, with the token
#   cluster/node.sh python -m raychat.tracking.mlflow_ui       Python of this installation, with the settings below
#   cluster/node.sh stop                                       ends both; other Ray clusters of this machine go on
#
# Every machine needs the same token in ~/.ray/auth_token (`ray get-auth-token --generate` on one, then copy it).
# What is set in ~/raychat.env (RAYCHAT_STORAGE_PATH=s3://bucket/runs, RAYCHAT_BASE_DIR=...), or in the environment, holds for
# the jobs of the cluster. Logs: ~/.raychat-node. With RAYCHAT_POWER_OFF_S=900, a rented machine whose Ray has been gone for so long
# (as it is a minute after its head) powers itself off.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${RAYCHAT_BIN:-$ROOT/.venv/bin}
STATE=${RAYCHAT_NODE_DIR:-$HOME/.raychat-node}
START_S=120 # for Ray to come up; 8 to 18 s are usual
STOP_S=60   # Ray drains its node for up to 30 s first

fail() {
  echo "node.sh: $*" >&2
  exit 1
}

setup() {
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "raychat needs Python 3.11 or newer: install one and name it, PYTHON=python3.12 $0 setup"
  "$python" -m venv "$ROOT/.venv"
  "$ROOT/.venv/bin/pip" install --quiet --disable-pip-version-check -c "$ROOT/.ci/constraints.txt" -e "$ROOT" "$@"
}

settings() { # jobs inherit them from Ray: `python` is this one, and a stopped job has this long for its save
  export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-120} PATH="$BIN:$PATH"
  set -a
  # shellcheck source=/dev/null
  [ ! -f "$HOME/raychat.env" ] || . "$HOME/raychat.env"
  set +a
}

# The local disk of the machine, if it has one, at $1. It is emptied: what lies on it never outlives the machine.
local_disk() {
  local at=$1 disk=
  sudo mkdir -p "$at"
  mountpoint -q "$at" || for disk in /dev/disk/by-id/{nvme-Amazon_EC2_NVMe_Instance_Storage_*,google-local-nvme-ssd-0}; do
    if mountpoint -q /opt/dlami/nvme; then # images for deep learning on AWS have it mounted
      sudo mount --bind /opt/dlami/nvme "$at" && break
    elif [ -b "$disk" ]; then
      sudo mkfs.ext4 -q -F "$disk" && sudo mount "$disk" "$at" && break
    fi
  done
  sudo chown "$(id -u):$(id -g)" "$at"
}

option() { # its value among the options of `ray start`, written with = or with a space
  local name=$1 value=
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      "$name="*) value=${1#*=} ;;
      "$name") value=${2:-} ;;
    esac
    shift
  done
  echo "$value"
}

background() { # runs `node.sh $2...` until `stop`, with $1 as the name of its log
  setsid nohup "$ROOT/cluster/node.sh" "${@:2}" >>"$STATE/$1.log" 2>&1 </dev/null &
  echo $! >"$STATE/$1.pid"
}

start() {
  [ -x "$BIN/ray" ] || fail "there is no $BIN/ray: run '$0 setup' first"
  if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$HOME/.ray/auth_token" ]; then
    fail "there is no token in ~/.ray/auth_token: make one with '$BIN/ray get-auth-token --generate', and copy it to all machines"
  fi
  local config joins port address
  config=$(option --autoscaling-config "$@") joins=$(option --address "$@") port=$(option --port "$@")
  address=${joins:-127.0.0.1:${port:-6379}}
  stop
  mkdir -p "$STATE"
  cd "$ROOT" # jobs that upload nothing start here
  ulimit -n 65536 2>/dev/null || true
  : >"$STATE/ray.log"
  setsid nohup "$BIN/ray" start "$@" ${config:+--no-monitor} --block >"$STATE/ray.log" 2>&1 </dev/null &
  echo $! >"$STATE/ray.pid"
  for ((i = 0; i < 5 * START_S; i++)); do
    grep -q 'Ray runtime started' "$STATE/ray.log" && break
    kill -0 "$(cat "$STATE/ray.pid")" 2>/dev/null || break
    sleep 0.2
  done
  if ! grep -q 'Ray runtime started' "$STATE/ray.log"; then
    kill -KILL -- "-$(cat "$STATE/ray.pid")" 2>/dev/null || true # what the failed start has left
    cat "$STATE/ray.log" >&2
    fail "Ray did not start; its output stands above"
  fi
  background watcher keep raychat.on_ray.node_watcher --address "$address"
  [ -z "$config" ] || background autoscaler keep raychat.on_ray.autoscaler --address "$address" --autoscaling-config "$config"
  [ -z "${RAYCHAT_POWER_OFF_S:-}" ] || background leave leave "$RAYCHAT_POWER_OFF_S"
  echo "node.sh: Ray runs; stop it with '$0 stop', see $STATE/ray.log and $STATE/watcher.log"
}

# A module of raychat, started again whenever it ends. Bash hands SIGTERM on, so that a shutdown of the machine drains the node.
keep() {
  local child=
  trap 'kill -TERM "$child" 2>/dev/null; wait "$child"; exit' TERM
  cd "$ROOT"
  while true; do
    "$BIN/python" -m "$@" &
    child=$!
    wait "$child" || true
    sleep 2 &
    child=$!
    wait "$child" || true
  done
}

# Ends this machine when its Ray has been gone for $1 seconds: nobody is left to end it, and it costs.
leave() {
  local since=$SECONDS
  while ((SECONDS - since < $1)); do
    sleep 1
    if kill -0 "$(cat "$STATE/ray.pid")" 2>/dev/null; then since=$SECONDS; fi
  done
  echo "Ray has been gone for $1 s: powering off"
  sudo poweroff
}

stop() {
  local name pid
  for name in leave watcher autoscaler ray; do
    [ -s "$STATE/$name.pid" ] || continue
    pid=$(cat "$STATE/$name.pid")
    # A machine that was started anew may have given the number to another process.
    if grep -aq -e node.sh -e 'ray' "/proc/$pid/cmdline" 2>/dev/null; then
      if [ "$name" != ray ]; then
        kill -KILL -- "-$pid" 2>/dev/null || true # the watcher's SIGTERM means that the machine goes
      else
        kill -TERM "$pid" 2>/dev/null || true
        for ((i = 0; i < 5 * STOP_S; i++)); do
          kill -0 "$pid" 2>/dev/null || break
          sleep 0.2
        done
        kill -KILL -- "-$pid" 2>/dev/null || true # what is left of its session
      fi
    fi
    rm -f "$STATE/$name.pid"
  done
}

case ${1:-} in
  setup) setup "${@:2}" ;;
  disk) local_disk "${2:?disk PATH}" ;;
  python)
    settings
    cd "$ROOT"
    exec "$BIN/python" "${@:2}"
    ;;
  ray)
    settings
    if [ "${2:-}" = start ]; then start "${@:3}"; else exec "$BIN/ray" "${@:2}"; fi
    ;;
  keep) keep "${@:2}" ;;
  leave) leave "${2:?leave SECONDS}" ;;
  stop) stop ;;
  *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac
