# shellcheck shell=bash
# The one file to edit: what a node of your cluster is, and how it gets to Python and to the others.
# Read by the batch shell, and by each node before it does anything. Every value can also be given in
# the environment of sbatch.

# module load cuda/12.8

: "${PYTHON:=.venv/bin/python}"  # of `make setup`, on a file system that all nodes see
: "${DEVICE:=cuda}"              # cuda, or cpu on nodes without GPUs
: "${RANKS_PER_NODE:=8}"         # one for each GPU
: "${MIN_FREE_GB:=500}"          # space that a node must find for the run's folder
: "${CHECK_SECONDS:=300}"        # how long nodes may take for their check
: "${JOIN_SECONDS:=600}"         # how long nodes wait for each other to start
# How long ranks may save after a SIGTERM before they are killed: the partition's GraceTime.
: "${SHUTDOWN_SECONDS:=120}"

# The network between nodes. NCCL takes InfiniBand where it finds it; name the interface where it, or
# the exchange of addresses over TCP, takes a wrong one (`ip -brief address`).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
: "${NCCL_DEBUG:=WARN}"                    # INFO says which transport is taken
: "${TORCH_FR_BUFFER_SIZE:=2000}"          # the last collectives of a rank, written ...
: "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"       # ... when one of them hangs (node.sh says where)
# Tensor parallelism's collectives are to start before the GEMMs that they run beside.
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"
# Batches of uneven memory leave holes; segments that grow leave few.
: "${PYTORCH_CUDA_ALLOC_CONF:=expandable_segments:True}"
export NCCL_DEBUG TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT CUDA_DEVICE_MAX_CONNECTIONS
export PYTORCH_CUDA_ALLOC_CONF
