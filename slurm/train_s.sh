#!/usr/bin/env bash
# S on CUB-200:  sbatch slurm/train_s.sh [a.b=value ...]      bash slurm/train_s.sh --dry-run
#SBATCH --job-name=vqd-s
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# More that a site may need: --partition, --account, --qos, --exclusive. On a preemptible partition ranks have its
# GraceTime to save.

CONFIG=${CONFIG:-configs/published/cub200-s.yaml}
MAX_REQUEUES=${MAX_REQUEUES:-20}

source slurm/job.sh
stage train tools/train.py "$CONFIG" "$@"
