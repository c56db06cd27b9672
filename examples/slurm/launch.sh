# shellcheck shell=bash
# What the batch scripts share. They run in the job's first node and call
#   train CONFIG.yaml [OTHER_CONFIG.yaml] [--OVERRIDE VALUE...]
# which checks the settings and the nodes, trains on all of them, and, when Slurm says that the time
# is nearly over, has the run save and stop, and puts the job back into the queue.
#
# The conversation with the run is files in its folder (training/stop.py): `stop` asks it to stop; it
# answers with `requeue` when it has saved. SIGUSR1 comes here and not to the ranks (--signal=B:),
# as torchrun would pass it on and then count the seconds until it kills them.
set -uo pipefail
# shellcheck source=examples/slurm/cluster.sh
source examples/slurm/cluster.sh

train() {
    [[ ${2:---} == --* ]] || shift
    local arguments=(--config "$@")
    local nodes=${SLURM_JOB_NUM_NODES:-$(sed -n 's/^#SBATCH --nodes=//p' "$0")}
    local ranks=$((nodes * RANKS_PER_NODE)) output
    output=$("$PYTHON" examples/slurm/resolve.py folder "$ranks" "${arguments[@]}") || exit
    if [[ -n ${DRY_RUN:-} ]]; then
        _show "$nodes" "$ranks" "$output" "${arguments[@]}"
        return
    fi
    mkdir -p "$output" || exit
    _say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)):" \
        "$ranks ranks on $SLURM_JOB_NODELIST; $output"
    local hosts step_before
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ((${#hosts[@]} == nodes)) || _fail "scontrol names ${#hosts[@]} hosts of a job of $nodes nodes"
    # Before anything that takes time: from here on the job can be told to stop.
    asked=''
    trap '_ask_to_stop USR1 "$output"' USR1
    trap '_ask_to_stop TERM "$output"' TERM
    step_before=$(_stopped_at "$output")
    rm -f "$output/stop" "$output/requeue"
    _check_nodes "$output" "${hosts[@]}"
    _run_step _srun --kill-on-bad-exit=1 bash examples/slurm/node.sh \
        train "${hosts[0]}" "$(_port)" "$output" "${arguments[@]}"
    _leave "$output" "$step_before" "$status"
}

# Between 10,000 and 30,000, below the ports that systems give out by themselves; jobs that share a
# node have different ones.
_port() { echo $((10000 + SLURM_JOB_ID % 20000)); }

_srun() {
    # Since Slurm 22.05 a step does not take a job's CPUs for each task by itself.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$@"
}

# Run a command to its end, through the signals that interrupt `wait`; its status is in $status.
_run_step() {
    "$@" &
    local step=$! seen
    while :; do
        seen=$asked
        wait "$step"
        status=$?
        [[ $asked != "$seen" ]] || return 0
    done
}

# A trap: bash runs it between commands, and `wait` is one that it interrupts.
_ask_to_stop() {
    asked+=" $1"
    : >"$2/stop"
    _say "SIG$1: the run is asked to save and stop"
}

_stopped_at() { sed -n 's/^stopped at step \([0-9]*\) .*/\1/p' "$1/requeue" 2>/dev/null; }

_check_nodes() {
    local output=$1 host line bad=() report
    shift
    report=$(timeout "$CHECK_SECONDS" srun --nodes=$# --ntasks=$# --ntasks-per-node=1 \
        bash examples/slurm/node.sh check "$1" "$output")
    for host in "$@"; do
        line=$(grep -m 1 "^$host " <<<"$report") || line="$host has not answered"
        [[ $line != "$host ok "* ]] || continue
        _say "node $line"
        bad+=("$host")
    done
    ((${#bad[@]} == 0)) || _fail "${#bad[@]} of $# nodes cannot take part:" \
        "submit again with --exclude=$(IFS=, && echo "${bad[*]}")"
    if (($(sed -n 's/^[^ ]* ok //p' <<<"$report" | sort -u | wc -l) > 1)); then
        sort <<<"$report" >&2
        _fail 'nodes differ in what is installed on them'
    fi
    _say "nodes: $# $(sed -n '1s/^[^ ]* //p' <<<"$report")"
}

# The job's end: done, failed, or back into the queue.
_leave() {
    local output=$1 before=$2 status=$3 step
    step=$(_stopped_at "$output")
    if [[ $status == 0 || -z $step ]]; then
        [[ $status == 0 ]] || _say "the run failed with status $status; what each rank said is in" \
            "$output/logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        exit "$status"
    fi
    # Stopped by hand (touch OUTPUT/stop), or by SIGTERM: of scancel, after which nothing is to start
    # again, or of preemption, after which Slurm queues the job itself.
    if [[ $asked != *USR1* ]]; then
        _say "stopped at step $step; the same sbatch goes on from there"
        exit 0
    fi
    [[ $step != "$before" ]] || _fail "two starts in a row have stopped at step $step: the job's time" \
        "is too short for a step"
    trap '' USR1 TERM  # requeueing ends this shell, and must not ask the next start to stop
    _say "stopped at step $step; back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || _fail "scontrol requeue $SLURM_JOB_ID: submit again by hand"
    exit 0
}

# A dry run: what would be started, with which settings.
_show() {
    local nodes=$1 ranks=$2 output=$3
    shift 3
    echo "# $ranks ranks: $nodes nodes x $RANKS_PER_NODE; on each node:"
    SLURMD_NODENAME=NODE SLURM_NNODES=$nodes SLURM_JOB_ID=JOB \
        bash examples/slurm/node.sh train FIRST_HOST PORT "$output" "$@"
    echo "# environment:"
    env | grep -E '^(NCCL|GLOO|TORCH|CUDA|PYTORCH)_' | sort
    echo "# settings:"
    "$PYTHON" examples/slurm/resolve.py settings "$ranks" "$@"
}

_say() { echo "$(date +%H:%M:%S) $*" >&2; }

_fail() {
    echo "error: $*" >&2
    exit 1
}
