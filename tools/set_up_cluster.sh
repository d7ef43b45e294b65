#!/usr/bin/env bash
# Set up Python with everything that a GPU node runs, step by step. The Dockerfile takes the same steps.
#
#   tools/set_up_cluster.sh --to /shared/kanana                    every step but system and apex
#   tools/set_up_cluster.sh --to /shared/kanana torch project      these steps alone
#   tools/set_up_cluster.sh --to /shared/kanana --print            what would be run
#
# Steps, in order:
#   system              compiler, git and Python from the distribution (apt-get, as root)
#   environment         a virtual environment
#   torch               torch with its CUDA libraries, and what builds extensions
#   transformer_engine  NVIDIA's layers, built against this torch (CUDA toolkit needed)
#   apex                NVIDIA's fused optimizers and norms, built from source (minutes; CUDA toolkit)
#   dependencies        megatron-core and all else that pyproject.toml names
#   project             this package with its compiled operations
#   check               everything can be imported; needs no GPU
#
# Versions are those of constraints.txt. Variables: PYTHON (3.11 or newer; python3.12 where there is
# one, else python3), CUDA_HOME (/usr/local/cuda), TORCH_CUDA_ARCH_LIST (9.0a: H100, H200), MAX_JOBS.
set -euo pipefail

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d # 2026-07-08
STEPS=(system environment torch transformer_engine apex dependencies project check)
UNASKED=(environment torch transformer_engine dependencies project check)

step_system() {
    run apt-get update
    run env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates git g++ ninja-build python3 python3-dev python3-venv
}

step_environment() {
    run "$PYTHON" -m venv "${VENV_OPTIONS[@]}" "$ENVIRONMENT"
}

step_torch() {
    install setuptools wheel ninja packaging pybind11 torch
}

step_transformer_engine() {
    # torch brings the headers of cuDNN and NCCL, in folders where no compiler looks.
    local libraries architectures=${TORCH_CUDA_ARCH_LIST//./}
    libraries=$(echo "$ENVIRONMENT"/lib/python3.*/site-packages/nvidia)
    run env "CUDNN_PATH=$libraries/cudnn" \
        "CPATH=$libraries/cudnn/include:$libraries/nccl/include${CPATH:+:$CPATH}" \
        NVTE_FRAMEWORK=pytorch "NVTE_CUDA_ARCHS=${architectures//a/}" \
        "$ENVIRONMENT/bin/python" -m pip install "${PIP_OPTIONS[@]}" --no-build-isolation \
        'transformer-engine[core-cu13,pytorch]'
}

step_apex() {
    run env APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "APEX_PARALLEL_BUILD=${MAX_JOBS:-8}" \
        "$ENVIRONMENT/bin/python" -m pip install "${PIP_OPTIONS[@]}" --no-build-isolation \
        "git+https://github.com/NVIDIA/apex.git@$APEX_COMMIT"
}

step_dependencies() {
    local listed names
    listed=$("$PYTHON" -c 'import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"], sep="\n")' "$PROJECT/pyproject.toml")
    mapfile -t names <<<"$listed"
    install "${names[@]}"
}

step_project() {
    run "$ENVIRONMENT/bin/python" -m pip install "${PIP_OPTIONS[@]}" --no-build-isolation --no-deps \
        "$PROJECT"
}

step_check() {
    # In another folder, so that the installed package is found and not the checkout.
    run env --chdir=/ "$ENVIRONMENT/bin/python" -m megatron_kanana.train --print-config device=cpu
    run env --chdir=/ "$ENVIRONMENT/bin/python" -c \
        'import torch, megatron.core, megatron_kanana; print("torch", torch.__version__, "with CUDA", torch.version.cuda)'
}

install() {
    run "$ENVIRONMENT/bin/python" -m pip install "${PIP_OPTIONS[@]}" "$@"
}

run() {
    printf '+ %s\n' "${*@Q}"
    "$PRINT_ONLY" || "$@"
}

fail() {
    printf '%s\n' "$1" >&2
    exit 2
}

ENVIRONMENT='' PRINT_ONLY=false VENV_OPTIONS=() wanted=()
while (($#)); do
    case $1 in
    --to)
        ENVIRONMENT=${2:?--to needs a folder}
        shift
        ;;
    --print) PRINT_ONLY=true ;;
    --system-site-packages) VENV_OPTIONS=(--system-site-packages) ;; # adds to what is installed
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    -*) fail "$1 is no option: --to, --print, --system-site-packages, --help" ;;
    *)
        [[ " ${STEPS[*]} " == *" $1 "* ]] || fail "$1 is no step: ${STEPS[*]}"
        wanted+=("$1")
        ;;
    esac
    shift
done
((${#wanted[@]})) || wanted=("${UNASKED[@]}")
[[ $ENVIRONMENT || ${wanted[*]} == system ]] || fail "say where: --to FOLDER"
PYTHON=${PYTHON:-$(python3.12 -c 'print("python3.12")' 2>/dev/null || echo python3)}
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
PIP_OPTIONS=(--disable-pip-version-check --no-cache-dir --constraint "$PROJECT/constraints.txt")

for step in "${STEPS[@]}"; do
    [[ " ${wanted[*]} " != *" $step "* ]] || "step_$step"
done
