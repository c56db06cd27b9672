#!/usr/bin/env bash
# What srun starts once on each node:
#   node.sh check HEAD OUTPUT               one line on whether the node can take part
#   node.sh train HEAD PORT OUTPUT ARG...   torchrun with this node's ranks
# HEAD is the job's first host, where the nodes meet. With DRY_RUN=1 `train` prints its command.
set -euo pipefail
# shellcheck source=examples/slurm/cluster.sh
source examples/slurm/cluster.sh

# The name under which Slurm, and so the other nodes, know this one.
node=$SLURMD_NODENAME
action=$1 head=$2
shift 2

if [[ $action == check ]]; then
    exec "$PYTHON" examples/slurm/check_node.py "$node" "$head" "$1" \
        --ranks "$RANKS_PER_NODE" --device "$DEVICE" --min_free_gb "$MIN_FREE_GB"
fi

port=$1 output=$2
shift 2
id=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export TORCH_FR_DUMP_TEMP_FILE=$output/logs/$id/nccl_
# What a rank says carries its number: all of it is in files, and local rank 0's in the job's log.
# shellcheck disable=SC2016  # torchrun fills it in
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
is_host=0
[[ $node != "$head" ]] || is_host=1
signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
command=(
    "$PYTHON" -m torch.distributed.run
    --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE"
    # The first host serves the meeting because it is told to, not because its name looks like it: a
    # node that cannot reach it fails, and never makes a world of its own.
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$id"
    --rdzv-conf "is_host=$is_host,join_timeout=$JOIN_SECONDS"
    --local-addr "$node"
    # Unhandled, SIGUSR1 would kill torchrun at once and leave its ranks behind.
    --signals-to-handle "$signals"
    --shutdown-timeout "$SHUTDOWN_SECONDS"
    --log-dir "$output/logs/$id/$node" --tee 3 --local-ranks-filter 0
    -m megatron_jam.train "$@"
)
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
mkdir -p "$output/logs/$id/$node"
exec "${command[@]}"
