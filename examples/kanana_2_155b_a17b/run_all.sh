#!/usr/bin/env bash
# All scripts in order.
#
#   SCALE=tiny bash run_all.sh    on this machine, one after another
#   DRY_RUN=1 bash run_all.sh     anywhere: every command of the real run, every configuration checked
#   bash run_all.sh               on a cluster: checked, then submitted, each after the one before
#
# Started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")"
scripts=([0-9]*.sbatch)

if [[ ${SCALE:-full} == tiny || -n ${DRY_RUN:-} ]]; then
    for script in "${scripts[@]}"; do
        echo "== $script"
        began=$SECONDS
        bash "$script"
        echo "== $script took $((SECONDS - began)) s"
    done
    exit
fi

for script in "${scripts[@]}"; do
    DRY_RUN=1 bash "$script" >/dev/null
done
previous=
for script in "${scripts[@]}"; do
    previous=$(sbatch --parsable ${previous:+"--dependency=afterok:$previous"} "$script")
    echo "$script: job $previous"
done
