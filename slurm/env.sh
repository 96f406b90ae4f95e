# shellcheck shell=bash
# The environment of every rank: what a site may want to change once, for all jobs. Sourced by slurm/job.sh; in
# the shell of an `salloc`, `source slurm/env.sh` before `srun python tools/train.py …`.
#
# Whatever is set already is kept, so that `sbatch --export=ALL,PYTHON=… slurm/train_f.sh` works as well.

# The python of `make setup`. Modules that it needs (a compiler, CUDA) are loaded here: module load …
export PYTHON=${PYTHON:-.venv/bin/python}

# `sbatch --export=NONE` would leave the ranks without PATH and without what is set here.
unset SLURM_EXPORT_ENV
export PATH

# Where the ranks meet: the first of the job's nodes, at a free port below the ephemeral ones, another at each start.
if [ -n "${SLURM_JOB_ID:-}" ]; then
    # Another job's, whose environment this job inherited.
    [ "${RENDEZVOUS_OF_JOB:-$SLURM_JOB_ID}" = "$SLURM_JOB_ID" ] || unset MASTER_ADDR MASTER_PORT
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    if [ -z "${MASTER_PORT:-}" ]; then
        MASTER_PORT=$((10000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 20000))
        while grep -Eqs "^ *[0-9]+: [0-9A-F]+:$(printf %04X "$MASTER_PORT") " /proc/net/tcp /proc/net/tcp6; do
            MASTER_PORT=$((MASTER_PORT + 1))
        done
    fi
    export MASTER_ADDR MASTER_PORT RENDEZVOUS_OF_JOB=$SLURM_JOB_ID
fi

# A rank's threads: its share of the cores that Slurm gave, where --cpus-per-gpu or --cpus-per-task says so.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_GPU:-${SLURM_CPUS_PER_TASK:-1}}}
# srun of Slurm 22.05 and later does not take it over from sbatch.
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# NCCL chooses well on most clusters. Name the device of the fast network where it takes a slow one:
#   export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# and see what it chose with NCCL_DEBUG=INFO.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Compute nodes often cannot reach the internet.
export WANDB_MODE=${WANDB_MODE:-offline} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
