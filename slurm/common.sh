# shellcheck shell=bash
# Shared by the job scripts, which source it in the repository. Users set variables before sbatch or with --export:
#
#   CNNOPT_SETUP      file to source in this script and before each rank: module load, conda activate, proxies
#   LAUNCHER          srun (default), horovodrun (needs ssh between the nodes), pmix (needs a Horovod built with MPI)
#   CNNOPT_INTERFACE  with srun: network of the rendezvous and of NCCL, such as ib0  [that of the node's name]
#   CNNOPT_PORT       with srun: port of the rendezvous  [any free one]
#   CONTAINER         image.sif: run in Apptainer; anything else: an image for pyxis
#   CNNOPT_MOUNTS     folders that the container sees besides this one, such as /shared/cifar,/scratch/runs
#   MAX_RESTARTS      how often a job that was stopped or broken is queued again  [20]

say() {  # prints a line; without "|| true", a full disk of the log would end the script
    echo "$*" 2>/dev/null || true
}

refuse() {  # prints one line and ends with the status of wrong input
    say "$SLURM_JOB_NAME: $*" >&2
    exit 2
}

hand_on() {  # passes a stop on to the command that train has started, if any
    [[ -z $child ]] || kill -s "$stop" "$child" 2>/dev/null || true
}

# A script that trains sets TRAINS=1 before it sources this file. A stop that comes before the ranks start, such as in
# the site's set-up, then puts the job back into the queue too.
told=0 child="" stop=USR1
[[ -z ${TRAINS:-} ]] || trap 'told=1; say "told to stop: saving"; hand_on' USR1 TERM

LAUNCHER=${LAUNCHER:-srun}
CONTAINER=${CONTAINER:-}
CNNOPT_MOUNTS=${CNNOPT_MOUNTS:-}
MAX_RESTARTS=${MAX_RESTARTS:-20}
RESTARTS=${SLURM_RESTART_COUNT:-0}
GPUS=${SLURM_GPUS_ON_NODE:-0}
if [[ -n ${CNNOPT_SETUP:-} ]]; then
    [[ -r $CNNOPT_SETUP ]] || refuse "CNNOPT_SETUP=$CNNOPT_SETUP: there is no such file on $(hostname)"
    CNNOPT_SETUP=$(realpath "$CNNOPT_SETUP")
    export CNNOPT_SETUP
    # Modules and conda are not written for strict modes. A sourced file sees the arguments of this script, and `source
    # activate` would take them for its own.
    given=("$@")
    set --
    set +eu +o pipefail
    # shellcheck disable=SC1090
    source "$CNNOPT_SETUP"
    site=$?
    set -eu -o pipefail
    set -- ${given[@]+"${given[@]}"}
    ((site == 0)) || refuse "CNNOPT_SETUP=$CNNOPT_SETUP: its last command failed with status $site"
fi
PATH=$PWD/.venv/bin:$PATH
# It would keep `python -m cnnopt...` from finding this folder.
unset PYTHONSAFEPATH
if [[ $LAUNCHER != srun && -n ${CNNOPT_INTERFACE:-}${CNNOPT_PORT:-} ]]; then
    refuse "CNNOPT_INTERFACE and CNNOPT_PORT are for LAUNCHER=srun, not $LAUNCHER"
fi

# step: the command that starts tasks. inside: the command that sets up the node and puts a task into the image.
# After sbatch --export, and at sites with SBATCH_EXPORT=NONE, srun would keep this script's variables from the tasks.
step=(srun --export=ALL --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})
inside=(${CNNOPT_SETUP:+slurm/set_up.sh})
case $CONTAINER in
    "") python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("horovod") is None)' 2>/dev/null ||
        refuse "no .venv in $PWD and no environment with Horovod active: run 'make env' on a login node" ;;
    *.sif)
        inside+=(apptainer exec --bind "$PWD${CNNOPT_MOUNTS:+,$CNNOPT_MOUNTS}" --pwd "$PWD")
        if ((GPUS)); then inside+=(--nv); fi
        inside+=("$CONTAINER") ;;
    *)
        # The tasks start in the image, which has no modules. srun passes this script's variables on to them.
        inside=()
        # In pyxis' notation. Each folder has the same path inside the image.
        mounts=$PWD:$PWD
        for folder in ${CNNOPT_MOUNTS//,/ }; do mounts+=,$folder:$folder; done
        if [[ $LAUNCHER == horovodrun ]]; then refuse "CONTAINER=$CONTAINER: pyxis needs LAUNCHER=srun or pmix"; fi
        step+=("--container-image=$CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD") ;;
esac

describe() {  # prints the nodes, commit, launcher and versions of this job
    echo "job       $SLURM_JOB_ID, start $((RESTARTS + 1)), $(date '+%F %T')"
    echo "nodes     $(scontrol show hostnames | paste -sd ' '): $SLURM_NTASKS ranks, $GPUS GPUs a node"
    echo "commit    $(git describe --always --dirty 2>/dev/null || echo 'no git here')"
    echo "launcher  $LAUNCHER, $(srun --version)${CONTAINER:+, in $CONTAINER}"
    [[ -n $CONTAINER ]] || python - <<'PYTHON' || true
import platform
from importlib.metadata import version

print("versions  Python", platform.python_version(), "Horovod", version("horovod"), "TensorFlow", version("tensorflow"))
PYTHON
}

train() {  # runs train_hvd.py on all ranks of this job, then ends the script or requeues the job
    if ((GPUS)) && [[ ${SLURM_NTASKS_PER_NODE:-$GPUS} != "$GPUS" ]]; then
        refuse "$SLURM_NTASKS_PER_NODE ranks for $GPUS GPUs on each node: give sbatch --ntasks-per-node=$GPUS"
    fi
    local status=0
    # The signal may reach the commands in describe too.
    describe || true
    local program=("${inside[@]}" python train_hvd.py "$@" --expect-ranks "$SLURM_NTASKS")
    local command
    case $LAUNCHER in
        srun)
            # cnnopt.launch uses the standard library only. It runs on the host, whatever image the ranks are in.
            command=(python3 -m cnnopt.launch ${CNNOPT_INTERFACE:+--interface "$CNNOPT_INTERFACE"}
                ${CNNOPT_PORT:+--port "$CNNOPT_PORT"} -- "${step[@]}" "${program[@]}") ;;
        pmix) command=("${step[@]}" --mpi=pmix "${program[@]}") ;;
        horovodrun)
            local hosts
            hosts=$(srun hostname | sort | uniq -c | awk '{printf "%s%s:%s", (NR > 1 ? "," : ""), $2, $1}') || ((told))
            # horovodrun imports TensorFlow before it starts a rank. Keras 3 makes that slower (docs/benchmarks.md).
            export TF_USE_LEGACY_KERAS=1
            # As with srun: on a cold file system some ranks start minutes later than others. Gloo waits 30 s.
            export HOROVOD_GLOO_TIMEOUT_SECONDS=${HOROVOD_GLOO_TIMEOUT_SECONDS:-120}
            command=(horovodrun --gloo --disable-cache -np "$SLURM_NTASKS" -H "$hosts" "${program[@]}")
            stop=TERM ;;
        *) refuse "LAUNCHER=$LAUNCHER: choose srun, horovodrun or pmix" ;;
    esac
    say "command   ${command[*]}"

    if ((told)); then requeue_or_exit 75; fi
    "${command[@]}" &
    child=$!
    # The signal may have come between the last two lines.
    if ((told)); then hand_on; fi
    # A signal interrupts wait. The last wait gives the status of a child that has ended.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" || status=$?
    # After it was told to end its ranks, horovodrun returns 1, and now and then 0 (docs/reliability.md). If the run was
    # complete all the same, the next start finds that and ends.
    if [[ $LAUNCHER == horovodrun ]] && ((told)); then status=75; fi
    requeue_or_exit "$status"
}

requeue_or_exit() {  # requeues 75 (stopped and saved) and 129 to 254 (a rank was killed). Others would fail again.
    # So would 143 (SIGTERM): once a rank has failed, srun sends SIGTERM to a rank that is still starting, and reports
    # the higher status of the two. 130 is a person's Ctrl-C.
    local status=$1 job=$SLURM_JOB_ID
    # The last task of an array has the job number of the whole array, so name the task instead.
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    ((status == 75 || (status > 128 && status < 255 && status != 130 && status != 143))) || exit "$status"
    # Do not requeue a job that the user has cancelled, or that SLURM itself is about to requeue. SLURM's controller may
    # be busy, so ask it again. A filter of the user's, such as SQUEUE_STATES, would hide the job.
    unset "${!SQUEUE_@}"
    local state="" tries=0
    until state=$(squeue --noheader --jobs "$job" --format %T) && [[ -n $state ]]; do
        ((++tries < 4)) || { say "status $status, and squeue does not know this job: not queued again" >&2; break; }
        sleep 5
    done
    [[ $state == RUNNING ]] || exit "$status"
    if ((RESTARTS >= MAX_RESTARTS)); then
        say "$SLURM_JOB_NAME: status $status, and not queued again: MAX_RESTARTS=$MAX_RESTARTS is reached" >&2
        exit "$status"
    fi
    say "status $status: back into the queue, restart $((RESTARTS + 1)) of at most $MAX_RESTARTS"
    scontrol requeue "$job" || { sleep 5; scontrol requeue "$job"; } || exit "$status"
    # Wait for SLURM to end this script.
    trap - USR1 TERM
    sleep 60
    exit "$status"
}
