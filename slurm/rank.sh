#!/usr/bin/env bash
# rank.sh FOLDER COMMAND...: one rank, as srun starts it; how it ended is written into the folder. srun itself says
# the highest exit code of all ranks, and one that found a mistake is outdone by those that were ended for it.
set -uo pipefail
ends=$1
shift
# The log is this rank's own, so that it names a mistake even if other ranks name it too.
export VQD_RANK_LOG=1
# Signals for a rank reach this shell as well, which waits for the rank to save and end.
trap : TERM USR1 USR2
"$@"
status=$?
echo "$status" > "$ends/$SLURM_PROCID"
exit "$status"
