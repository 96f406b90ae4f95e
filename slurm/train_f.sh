#!/usr/bin/env bash
# F: pretraining on pictures from the web, then fine-tuning on COCO. One job, since a job is what Slurm starts again:
#
#   sbatch slurm/train_f.sh [a.b=value ...]      bash slurm/train_f.sh --dry-run
#SBATCH --job-name=vqd-f
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# More that a site may need: --partition, --account, --qos, --exclusive. On a preemptible partition ranks have its
# GraceTime to save.

CONFIGS=${CONFIGS:-configs/f}
MAX_REQUEUES=${MAX_REQUEUES:-20}

source slurm/job.sh
stage pretrain tools/train.py "$CONFIGS/pretrain.yaml" "$@"
stage finetune tools/train.py "$CONFIGS/finetune.yaml" "$@"
