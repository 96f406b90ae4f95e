# shellcheck shell=bash
# What the jobs of this folder share: `stage` runs a tool on all ranks, and starts the job again where that helps.
# Sourced after the #SBATCH lines and settings, with the script's own arguments; `--dry-run` as the first reads the
# configuration and shows what would run, without Slurm.
set -euo pipefail

DRY_RUN=
if [ "${1:-}" = --dry-run ]; then
    DRY_RUN=yes
    RANKS_PER_NODE=${RANKS_PER_NODE:-GPUS}
    shift
elif [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "this is a job: sbatch $0, or bash $0 --dry-run to see what would run" >&2
    exit 2
fi
if [ ! -f tools/train.py ]; then
    echo "submit from the project's top folder, where tools/ and configs/ are" >&2
    exit 2
fi

source slurm/env.sh

# How often the job may be started again, whatever for: a time limit, a hang, a lost node.
MAX_REQUEUES=${MAX_REQUEUES:-20}
LOGS=${LOGS:-slurm/logs}
# A rank for each GPU. srun is told, not sbatch: a job that names its tasks needs, when it is queued again, as many
# nodes as it had, whatever range --nodes gives.
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# Of an array only this task: the number of one of its tasks is that of the whole array.
JOB=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-JOB}}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

# The first start of a job begins with a dry run of all its stages: a mistake ends the job before any rank starts.
# Another failure is left to the ranks, after which the job is started again.
if [ -z "$DRY_RUN" ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
    status=0
    bash "$0" --dry-run "$@" > /dev/null || status=$?
    if [ "$status" -eq 2 ]; then
        exit 2
    fi
fi

# stage NAME TOOL ARGUMENT...
# A stage that was finished by an earlier start of this job is not started again.
stage() {
    local name=$1
    shift
    local logs=$LOGS/$JOB starts=${SLURM_RESTART_COUNT:-0}
    local ends=$logs/$name-ends-$starts
    local command=(srun "--ntasks-per-node=$RANKS_PER_NODE" --cpu-bind=none --kill-on-bad-exit=1
        --open-mode=append "--output=$logs/$name-rank-%t.log" bash slurm/rank.sh "$ends" "$PYTHON" "$@")
    if [ -n "$DRY_RUN" ]; then
        read_config "$@"
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    if [ -e "$logs/$name.done" ]; then
        echo "$name: done by an earlier start of this job"
        return
    fi
    mkdir -p "$ends"
    echo "$(date +%FT%T) $name: start $((starts + 1)) of at most $((MAX_REQUEUES + 1)) on $SLURM_JOB_NODELIST," \
        "$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE)) ranks; their logs are $logs/$name-rank-*.log"
    local status=0
    VQD_PROGRESS_FILE=$ends/progress "${command[@]}" || status=$?
    if [ "$status" -eq 0 ]; then
        touch "$logs/$name.done"
        echo "$(date +%FT%T) $name: done"
        return
    fi
    again "$name" "$status" "$logs" "$ends"
}

# read_config TOOL ARGUMENT...: let the tool read its configuration; its exit code is 2 after a mistake.
read_config() {
    if ! command -v "$PYTHON" > /dev/null; then
        echo "$PYTHON: no such program; run make setup first, or set PYTHON" >&2
        exit 2
    fi
    "$PYTHON" "$@" --print-config > /dev/null
}

# again NAME STATUS LOGS ENDS: ask for another start of the job, or leave.
again() {
    local name=$1 status=$2 logs=$3 ends=$4 starts=${SLURM_RESTART_COUNT:-0} mistaken
    # A mistake that one sentence names (exit code 2) would be made again.
    mistaken=$(ended_with 2 "$ends")
    if [ -n "$mistaken" ]; then
        echo "$name: $(tail -n 1 "$logs/$name-rank-$mistaken.log")" >&2
        exit 2
    fi
    # 75: all ranks saved after a signal; 76: a rank hung. Those that were ended meanwhile say less.
    local telling
    for telling in 76 75; do
        if [ -n "$(ended_with "$telling" "$ends")" ]; then
            status=$telling
        fi
    done
    if [ "$starts" -ge "$MAX_REQUEUES" ]; then
        echo "$name: ended with exit code $status after all $MAX_REQUEUES restarts that MAX_REQUEUES allows;" \
            "look at $logs, then submit it again: it goes on from its newest checkpoint." >&2
        exit "$status"
    fi
    # A start that ends without any progress, as the one before, would end so again. A saved run (75) is preempted.
    if [ "$status" -ne 75 ] && [ ! -e "$ends/progress" ]; then
        if [ "$(cat "$logs/$name-stuck" 2> /dev/null)" = "$((starts - 1)) $status" ]; then
            echo "$name: ended twice with exit code $status before any progress; look at $logs, then submit it" \
                "again." >&2
            exit "$status"
        fi
        echo "$starts $status" > "$logs/$name-stuck"
    fi
    echo "$(date +%FT%T) $name: ended with exit code $status; the job is queued again"
    if ! scontrol requeue "$JOB"; then
        echo "$name: Slurm refuses to queue this job again; submit it again: it goes on from its newest" \
            "checkpoint." >&2
    fi
    exit "$status"
}

# ended_with CODE ENDS: the first rank that ended so, if any did.
ended_with() {
    local found
    found=$(grep -lx "$1" "$2"/* 2> /dev/null | sort -V | head -n 1) || true
    echo "${found##*/}"
}
