#!/usr/bin/env bash
# Image shards to token shards, an array of jobs that share the shards out: a job that ends early is started again
# and does what is left of its own.
#
#   sbatch slurm/tokenize_laion.sh [a.b=value ...]      bash slurm/tokenize_laion.sh --dry-run
#SBATCH --job-name=vqd-tokenize
#SBATCH --array=0-63
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=12
#SBATCH --time=12:00:00
#SBATCH --signal=USR2@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
# More that a site may need: --partition, --account, --qos.

CONFIG=${CONFIG:-configs/tokenize/laion400m.yaml}
MAX_REQUEUES=${MAX_REQUEUES:-20}

source slurm/job.sh
# Which part of the shards is this job's, the tool reads from the array's variables.
stage tokenize tools/tokenize_shards.py "$CONFIG" "$@"
