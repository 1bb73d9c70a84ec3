#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, test, ceilings, kernels, steps, scale, sanitize, profile, table.
#
#   bench/gpu.sh                        all stages
#   bench/gpu.sh --only kernels         one stage (repeat --only for more)
#   PYTHON=python3.12 bench/gpu.sh      another interpreter; its own torch and triton are used
#
# Uses no network. Results go to bench/results/<gpu>-<date>.json, which is complete up to the last
# stage that finished. Exit status: 0 done, 1 a stage failed, 2 wrong use, or no GPU: then the build
# is checked and nothing is measured.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
ALL=(build test ceilings kernels steps scale sanitize profile table)
STAGES=()

while (($#)); do
    case "$1" in
        --only)
            if [[ " ${ALL[*]} " != *" ${2:-} "* || -z "${2:-}" ]]; then
                echo "gpu.sh: --only must be one of ${ALL[*]}, got '${2:-}'" >&2
                exit 2
            fi
            STAGES+=("$2")
            shift 2
            ;;
        -h | --help)
            sed -n '2,10s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *)
            echo "gpu.sh: unknown argument '$1' (see --help)" >&2
            exit 2
            ;;
    esac
done
((${#STAGES[@]})) || STAGES=("${ALL[@]}")

# What a stage needs is said before it starts, all of it at once.
require() {
    local missing=()
    for module in "$@"; do
        "$PYTHON" -c "import $module" 2>/dev/null || missing+=("$module")
    done
    if ((${#missing[@]})); then
        echo "gpu.sh: $PYTHON has no ${missing[*]}: install them, or set PYTHON" >&2
        exit 1
    fi
}

has_gpu() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

stage_build() {
    require torch triton numpy setuptools pybind11
    command -v nvcc >/dev/null || [[ -n "${CUDA_HOME:-}" ]] || {
        echo "gpu.sh: nvcc is not on PATH and CUDA_HOME is not set" >&2
        exit 1
    }
    FASTREG_CUDA=1 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
    "$PYTHON" -m fastreg env
}

# Ops and whole steps with their compiled kernels against float64, and what the compiler made of them.
stage_test() {
    "$PYTHON" -m fastreg env --kernels || echo "gpu.sh: see the faults above" >&2
    require pytest hypothesis
    "$PYTHON" -m pytest -q -m gpu tests
}

stage_ceilings() { "$PYTHON" bench/gpu_kernels.py ceilings "$RESULTS"; }

stage_kernels() {
    "$PYTHON" bench/gpu_kernels.py kernels "$RESULTS"
    "$PYTHON" bench/gpu_lists.py "$RESULTS"
}

# The suite at a GPU's sizes: in the dtype one trains in what one trains with, in float32 the rest.
stage_steps() {
    steps steps-bfloat16 bench/suite.py --dtype bfloat16 --parts norms penalty fisher monitor sam
    steps steps-float32 bench/suite.py --parts penalty regularizers hvp scaling
}

# What a large model chooses from, at sizes that are trained with. The largest is timed with fewer methods: each has a
# model of its own.
stage_scale() {
    local model
    for model in gpt-124m gpt-124m-4k gpt-350m gpt-350m-4k; do
        steps "scale-$model" -m fastreg bench --model "$model" --dtype bfloat16 --m 4 --rounds 5 --suite scale \
            --methods exact fisher exact_compiled plain_compiled m_sam monitor plain_checkpointed \
            exact_checkpointed exact_recomputed perturb
    done
    for model in gpt-1.3b gpt-1.3b-4k; do
        steps "scale-$model" -m fastreg bench --model "$model" --dtype bfloat16 --m 2 --rounds 3 --suite scale \
            --methods exact monitor exact_recomputed perturb
    done
}

# Runs a benchmark of steps, which is the rest of the arguments, and adds its document to the results under a name.
steps() {
    local part name=$1
    shift
    part=$(mktemp)
    "$PYTHON" "$@" --device cuda --json "$part" || echo "gpu.sh: see the rows above" >&2
    "$PYTHON" bench/gpu_results.py "$RESULTS" "$name" "$part"
    rm "$part"
}

# Out-of-bounds accesses and races, in the smaller tests of the CUDA kernels.
stage_sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "gpu.sh: compute-sanitizer is not on PATH: not run" >&2
        return
    fi
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m pytest -q -m gpu tests/test_multi_tensor.py
    done
}

# Where the three kernels that matter most lose time; ncu needs leave to read the card's counters.
stage_profile() {
    if ! command -v ncu >/dev/null; then
        echo "gpu.sh: ncu is not on PATH: not run" >&2
        return
    fi
    ncu --clock-control none --launch-count 6 --kernel-name 'regex:outer_(sum|apply)|norm_affine_backward' \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats \
        "$PYTHON" bench/gpu_kernels.py once >"${RESULTS%.json}-ncu.txt" ||
        echo "gpu.sh: ncu failed: ${RESULTS%.json}-ncu.txt says why" >&2
}

stage_table() { "$PYTHON" bench/gpu_table.py "$RESULTS"; }

require torch
if ! has_gpu; then
    echo "gpu.sh: no GPU that torch can use: the build is checked, nothing is measured" >&2
    stage_build
    exit 2
fi

name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
RESULTS=bench/results/$name-$(date -u +%F).json

for stage in "${STAGES[@]}"; do
    echo "== $stage"
    "stage_$stage"
done
