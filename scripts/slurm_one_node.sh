#!/usr/bin/env bash
# A real SLURM on this machine, for tests and trials: controller, node and munge on 127.0.0.1, without systemd, cgroups
# or accounting. As root, on Debian or Ubuntu:
#   bash scripts/slurm_one_node.sh install            packages slurm-wlm and munge
#   bash scripts/slurm_one_node.sh start [FOLDER]     then: export SLURM_CONF=FOLDER/slurm.conf
#   bash scripts/slurm_one_node.sh status [FOLDER]
#   bash scripts/slurm_one_node.sh stop [FOLDER]      ends the daemons and all jobs; FOLDER stays
# Everything lies in FOLDER (default: /tmp/slurm_one_node). Two nodes at once need different SLURM_PORT too.
# Two partitions: main, and urgent, whose jobs pre-empt those of main, which are requeued. One pretended GPU to count.
set -euo pipefail
action="${1:-}"
folder="$(realpath -m "${2:-/tmp/slurm_one_node}")"
port="${SLURM_PORT:-16817}"
host="$(hostname -s)"
export SLURM_CONF="$folder/slurm.conf"

running() {  # whether the daemon of a pid file runs; in a container nobody may collect ended ones
  local file="$folder/$1.pid"
  [ -s "$file" ] && grep -qs "^[0-9]* (${1##*/}) [^Z]" "/proc/$(cat "$file")/stat"
}

configure() {
  mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
  chmod 755 "$folder"
  chmod 700 "$folder/state" "$folder/spool"
  if [ ! -s "$folder/munge.key" ]; then
    (umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
  fi
  cat > "$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
# a requeued job waits until its old credential has expired
AuthInfo=socket=$folder/munge/socket,cred_expire=${SLURM_REQUEUE_WAIT:-5}
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ReturnToService=2
KillWait=5
MaxArraySize=${SLURM_MAX_ARRAY:-1001}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
  echo "Name=gpu File=/dev/null" > "$folder/gres.conf"  # counted, not there
}

start() {
  for command in munged slurmctld slurmd; do
    command -v "$command" > /dev/null || { echo "No $command: bash $0 install" >&2; exit 1; }
  done
  [ "$(id -u)" = 0 ] || { echo "The daemons need root." >&2; exit 1; }
  running slurmctld && running slurmd && running munge/munged || { stop; configure; }
  # --force: a folder that only root may enter will do
  running munge/munged || munged --force --key-file="$folder/munge.key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/munged.pid" --seed-file="$folder/munge/seed" --log-file="$folder/munge/log" --num-threads=2
  running slurmctld || slurmctld
  running slurmd || slurmd
  for _ in $(seq 60); do
    case "$(timeout 10 sinfo --noheader --partition=main --format=%t 2> /dev/null)" in
      idle | mix | alloc | comp) status; return ;;
      drain* | down* | inval) scontrol update "nodename=$host" state=resume 2> /dev/null || true ;;
    esac
    sleep 0.5
  done
  echo "The node does not come up; see $folder/slurmctld.log and slurmd.log." >&2
  exit 1
}

stop() {
  if running slurmctld; then
    timeout 10 scancel --user="$(id -un)" 2> /dev/null || true
    for _ in $(seq 40); do
      [ -n "$(timeout 10 squeue --noheader 2> /dev/null)" ] || break
      sleep 0.3
    done
  fi
  for name in slurmd slurmctld munge/munged; do
    running "$name" || continue
    kill "$(cat "$folder/$name.pid")"
    for _ in $(seq 40); do running "$name" || break; sleep 0.3; done
    ! running "$name" || kill -9 "$(cat "$folder/$name.pid")"
  done
}

status() {
  for name in munge/munged slurmctld slurmd; do
    running "$name" || { echo "stopped"; exit 1; }
  done
  timeout 10 sinfo
  echo "export SLURM_CONF=$SLURM_CONF"
}

case "$action" in
  install) apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge ;;
  start | stop | status) "$action" ;;
  *) sed -n '2,9s/^# //p' "$0"; exit 2 ;;
esac
