#!/usr/bin/env bash
# FID, KID and CLIP score of a finished run on COCO's captions:
#
#   RUN=runs/f/finetune sbatch slurm/eval_coco.sh [argument of tools/eval_coco_fid.py ...]
#   bash slurm/eval_coco.sh --dry-run
#
# Nodes rarely reach the internet: the feature extractor is a file, data/weights/… unless extractor.weights=FILE.
#SBATCH --job-name=vqd-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=12
#SBATCH --time=12:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# More that a site may need: --partition, --account, --qos.

RUN=${RUN:-runs/f/finetune}
DATA=${DATA:-data/coco/val}
MAX_REQUEUES=${MAX_REQUEUES:-20}

source slurm/job.sh
stage eval tools/eval_coco_fid.py "$RUN" --data "$DATA" "$@"
