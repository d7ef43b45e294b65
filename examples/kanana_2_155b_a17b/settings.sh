#!/usr/bin/env bash
# What the scripts of this folder share; each reads it first.
#
#   sbatch 06_stage_1.sbatch             the 155B, on nodes of eight H200s; submit from this folder
#   DRY_RUN=1 bash 06_stage_1.sbatch     anywhere: show the commands, check the configuration
#   SCALE=tiny bash 06_stage_1.sbatch    a model of 0.74 million parameters on this machine's CPU
#
# SBATCH_PARTITION, SBATCH_ACCOUNT and their like are sbatch's own variables.
# shellcheck disable=SC2034 # the scripts use what is set here
set -euo pipefail

SCALE=${SCALE:-full}
DRY_RUN=${DRY_RUN:-}
EXAMPLE=$PWD
PROJECT=$(cd ../.. && pwd)
SCRIPT=$EXAMPLE/$(basename "$0")
STAGE=${SLURM_JOB_NAME:-$(basename "$0" .sbatch)}
PATH="$PROJECT/.venv/bin:$PATH"
export PYTHONPATH="$PROJECT${PYTHONPATH:+:$PYTHONPATH}"
cd "$PROJECT"

case $SCALE in
full)
    # Where things are. The recipes name data/…; make `data` and `runs` links to a file system that all
    # nodes see. Yours to bring: data/corpus/SOURCE/*.jsonl.zst (.gz, .parquet, .txt) for each of
    # SOURCES, data/held_out/{ko,en}.jsonl and data/chat/{train,held_out}.jsonl.
    export DATA=data
    RUNS=${RUNS:-runs}
    TINY=

    # Nodes of this job without the spare one of cluster=h200_slurm; outside of a job, what the script
    # asks for. `sbatch --nodes=65 06_stage_1.sbatch` trains on 64.
    asked_nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$SCRIPT" 2>/dev/null || true)
    nodes=$((${SLURM_JOB_NUM_NODES:-${asked_nodes:-2}} - 1))
    WHERE=(cluster=h200_slurm "nodes=$nodes")
    LAYOUT=("parallel=h200_$((8 * nodes))") # there are h200_256, h200_512 and h200_1024

    # Tokenizer: shares of the text it is trained on.
    VOCABULARY=(--vocab-size 128256 --max-bytes 20e9)
    declare -A SHARES=(
        [english_web]=25 [english_books]=5 [math_stem]=10 [code]=15 [korean]=25
        [japanese]=5 [chinese]=5 [thai]=5 [vietnamese]=5 [reasoning]=0
    )

    # Proxy sweep: every width with every rate. Then the law, and the budget it is for.
    WIDTHS=(1024 1536)
    RATES=(2e-4 4e-4 8e-4 1.6e-3 3.2e-3)
    LAW=(--from-tokens 255e9 --every 10e9 --tokens 10e12)
    PUBLISHED_RATE=3.85e-4

    # Last steps of the stages. The first four stages are one run, with one schedule that says what
    # changes when; a stage stops beyond its change, at a checkpoint that is kept for good.
    SWEEP_END=32783          # 500B tokens
    STAGE_1_END=20000        # 0.17T tokens; a step has 8.4M
    BATCH_SWITCH_END=190000  # 5.8T tokens; 33.6M a step from step 23,843 (0.2T) on
    MIXTURE_SWITCH_END=200000 # 6.1T tokens; other shares, and the decay, from step 196,697 (6T) on
    PRETRAINING_END=315905   # 10T tokens
    MIDTRAINING_END=7451     # 250B tokens more
    LONG_CONTEXT_END=1000    # 34B tokens more
    SFT_END=1000
    ;;
tiny)
    WORK=${WORK:-$PROJECT/runs/kanana_2_155b_tiny}
    export DATA=$WORK/data
    RUNS=$WORK/runs
    TINY=_tiny # recipes of the same names, in the folder tiny
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    export PYTHONWARNINGS="ignore:Transformer Engine" # which no CPU has
    WHERE=(--config-dir "$EXAMPLE/tiny" device=cpu)
    PROCESSES=2
    LAYOUT=()
    # Half of the text is what the model will have to do, so that its few entries are whole words of it.
    VOCABULARY=(--vocab-size 1536 --max-bytes 2e6 --special-slots 32)
    declare -A SHARES=(
        [english_web]=5 [english_books]=5 [math_stem]=4 [code]=10 [korean]=10
        [japanese]=4 [chinese]=4 [thai]=4 [vietnamese]=4 [reasoning]=50
    )
    WIDTHS=(64 128)
    RATES=(1e-2 4e-2 1.6e-1)
    LAW=(--tokens 143360)
    PUBLISHED_RATE=4e-3
    SWEEP_END=40
    STAGE_1_END=15
    BATCH_SWITCH_END=40
    MIXTURE_SWITCH_END=60
    PRETRAINING_END=80
    MIDTRAINING_END=400
    LONG_CONTEXT_END=20
    SFT_END=250
    ;;
*)
    echo "SCALE=$SCALE: choose full or tiny" >&2
    exit 2
    ;;
esac
SOURCES=(
    english_web english_books math_stem code korean japanese chinese thai vietnamese reasoning
)
PRETRAINING=kanana_2_155b_a17b
MIDTRAINING=kanana_2_155b_midtraining
LONG_CONTEXT=kanana_2_155b_long_context
SFT=kanana_2_155b_sft

if [[ $SCALE == full && -n $DRY_RUN ]]; then
    RUNS=${RUNS%/dry_run}/dry_run # scripts of runs that may be under way stay as they are
elif [[ $SCALE == full && -z ${SLURM_JOB_ID:-} ]]; then
    echo "$STAGE: submit it from its folder with sbatch $(basename "$SCRIPT"), look at it with" \
        "DRY_RUN=1, or try it with SCALE=tiny" >&2
    exit 2
fi

say() { echo "$STAGE: $*"; }

show() { printf '+%s\n' "$(printf ' %q' "$@")"; }

# Show a command and run it.
run() {
    show "$@"
    [[ -n $DRY_RUN ]] || "$@"
}

# Train, with the words of tools/submit.py; nothing after it in a script is reached. In a job of SLURM
# it becomes the job's batch script, with pre-flight, signals and requeueing (docs/cluster.md).
train() {
    local command=(python tools/submit.py)
    if [[ $SCALE == tiny ]]; then # what submit.py would start on this machine, but forked: it starts sooner
        command=(python -m megatron_kanana.cluster.launch --standalone "--nproc-per-node=$PROCESSES"
            --start-method=fork --run-path megatron_kanana/train.py)
    fi
    command+=("${WHERE[@]}" "output_dir=$RUNS" "$@")
    show "${command[@]}"
    if [[ -n $DRY_RUN ]]; then
        [[ $SCALE == full ]] || exit 0
        exec "${command[@]}" --dry-run --without-files >/dev/null
    fi
    [[ $SCALE == tiny ]] || command+=(--in-job)
    exec "${command[@]}"
}

# Take the pre-training to a step, at the rate that the law gives, or at LEARNING_RATE.
pretrain() { # pretrain STEP
    local law=$RUNS/learning_rate_law_${WIDTHS[0]}.json rate=${LEARNING_RATE:-}
    if [[ -z $rate && -f $law ]]; then
        rate=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["budget"]["learning_rate"])' "$law")
    elif [[ -z $rate ]]; then
        need "$law" "run 05_fit_learning_rate.sbatch, or set LEARNING_RATE=$PUBLISHED_RATE"
        rate=$PUBLISHED_RATE
    fi
    train "experiment=$PRETRAINING$TINY" "${LAYOUT[@]}" "optimizer.learning_rate=$rate" \
        "schedule.minimum_learning_rate=$(awk "BEGIN { printf \"%.10g\", $rate / 10 }")" "stop_after_step=$1"
}

# Stop with one message where something is missing, such as the result of an earlier script.
need() { # need PATH REMEDY
    [[ -e $1 || -n $DRY_RUN ]] || { say "there is no $1: $2" >&2 && exit 2; }
}

# The step of a run's newest whole checkpoint; 0 without one.
newest_step() { # newest_step RUN
    local folder step=0
    for folder in "$RUNS/$1"/checkpoints/step_????????; do
        [[ ! -f $folder/settings.yaml ]] || step=$((10#${folder##*_}))
    done
    echo "$step"
}

need_step() { # need_step RUN STEP SCRIPT
    local step
    step=$(newest_step "$1")
    ((step >= $2)) || [[ -n $DRY_RUN ]] ||
        { say "$RUNS/$1 is at step $step of $2: run $3 first" >&2 && exit 2; }
}

# End here if a run has got as far as this script takes it.
done_at() { # done_at RUN STEP
    [[ -z $DRY_RUN ]] || return 0
    (($(newest_step "$1") < $2)) || { say "done: $RUNS/$1 is at step $2" && exit 0; }
}

# Path of a run's checkpoint.
checkpoint() { # checkpoint RUN STEP
    printf '%s/%s/checkpoints/step_%08d' "$RUNS" "$1" "$2"
}

# An array job without SLURM: a process for each of its tasks, two at a time.
tasks() { # tasks COUNT
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || return 0
    seq 0 $(($1 - 1)) | xargs -P 2 -I{} env SLURM_ARRAY_TASK_ID={} bash "$SCRIPT"
    exit
}
