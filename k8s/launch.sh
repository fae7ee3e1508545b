#!/usr/bin/env bash
# The command of the MPIJob's launcher. It runs train_hvd.py on all workers, with the flags that it is given.
#
# The operator mounts /etc/mpi/hostfile, with a line "<worker> slots=<ranks>" for each worker of the manifest, running
# or not. So the number of ranks is written once, as replicas and slotsPerWorker, and a missing worker is an error. A
# line that is not understood is an error too: --expect-ranks is counted from these lines, so it would not notice.
#
#   LAUNCH_PATIENCE   seconds to wait for workers that do not answer [600]
#   LAUNCH_AT_LEAST   this many workers are enough after that wait [all]
#   LAUNCH_HOSTFILE   another host file
#
# On SIGTERM the ranks save and end, then this script ends. The next launcher continues from the volume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Process 1 of a container ignores a signal for which it has no trap.
trap 'exit 143' TERM

# Kill old ranks on a worker. True once the worker answers: a restarted worker has no name and no sshd for a while. A
# worker that was not restarted may still hold ranks of the failed attempt, which would write to the same run.
cleared() {
    local status=0
    ssh -n "$1" pkill -KILL python || status=$?
    # pkill returns 0 or 1. 255 means that ssh itself failed.
    [ "$status" -ne 255 ]
}

# The form of a line: as the operator writes it for Open MPI, or "<worker>:<ranks>" as for Intel MPI and MPICH.
readonly form='^([A-Za-z0-9._-]+)([[:blank:]]+slots[[:blank:]]*=[[:blank:]]*|:)([0-9]+)$'
refuse() {
    echo "launch.sh: $hostfile, line $1: $2; write '<worker> slots=<ranks>', ranks at least 1, each worker once" >&2
    exit 2
}

readonly patience=${LAUNCH_PATIENCE:-600} hostfile=${LAUNCH_HOSTFILE:-/etc/mpi/hostfile}
if ! [[ $patience =~ ^[0-9]+$ && ${LAUNCH_AT_LEAST:-1} =~ ^[0-9]+$ ]]; then
    echo "launch.sh: LAUNCH_PATIENCE=$patience, LAUNCH_AT_LEAST=${LAUNCH_AT_LEAST:-}: give whole numbers" >&2
    exit 2
fi
workers=() slots=() number=0
# The last line may lack its newline.
while read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%$'\r'}
    line=${line%%#*}
    line=${line%"${line##*[![:blank:]]}"}
    [ -n "$line" ] || continue
    [[ $line =~ $form ]] || refuse "$number" "'$line' is not understood"
    [[ " ${workers[*]} " != *" ${BASH_REMATCH[1]} "* ]] || refuse "$number" "${BASH_REMATCH[1]} is named twice"
    # Without the base 10, 010 would be 8.
    [ "$((10#${BASH_REMATCH[3]}))" -gt 0 ] || refuse "$number" "no rank on ${BASH_REMATCH[1]}"
    workers+=("${BASH_REMATCH[1]}") slots+=("$((10#${BASH_REMATCH[3]}))")
done <"$hostfile"
all=${#workers[@]}
[ "$all" -gt 0 ] || refuse "$number" "no worker is named"

ranks=0 hosts=()
for i in "${!workers[@]}"; do
    until cleared "${workers[i]}"; do
        if [ "$SECONDS" -ge "$patience" ]; then
            echo "launch.sh: ${workers[i]} does not answer after $patience s (docs/kubernetes.md)" >&2
            continue 2
        fi
        sleep 2
    done
    hosts+=("${workers[i]}:${slots[i]}")
    ranks=$((ranks + slots[i]))
done
if [ "${#hosts[@]}" -lt "${LAUNCH_AT_LEAST:-$all}" ]; then
    echo "launch.sh: ${#hosts[@]} of $all workers answer, ${LAUNCH_AT_LEAST:-all} must" >&2
    exit 1
fi
echo "launch.sh: $ranks ranks on ${#hosts[@]} of $all workers"

# CNI plugins call the interface of a pod eth0. Naming it saves Horovod's search for an interface.
horovodrun --gloo --disable-cache --num-proc "$ranks" --hosts "$(IFS=,; echo "${hosts[*]}")" \
    --network-interfaces eth0 python train_hvd.py --expect-ranks "$ranks" "$@" &
job=$! told=""
# It is enough to tell one rank: all then stop after the same step. Try each worker, because one may be gone.
tell() {
    local host
    told=1
    for host in "${hosts[@]}"; do
        if ssh -n "${host%:*}" pkill -TERM python; then return 0; fi
    done
    # No rank has started yet. End horovodrun so that none starts.
    kill -TERM "$job" 2>/dev/null || true
}
trap tell TERM
until wait "$job"; do
    status=$?
    # A signal ends the wait, but not the job.
    kill -0 "$job" 2>/dev/null || exit "$status"
done
# After it was told to end its ranks, horovodrun now and then returns 0. The Job would then count as complete.
[ -z "$told" ] || exit 75
