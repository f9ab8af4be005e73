#!/usr/bin/env bash
# What a machine with a GPU is to show: the tests that need one, the speed of the steps, then
# SmolLM2-135M on real rows, and last the speed with runtime.compile.
#
#   benchmarks/on_gpu.sh OUT      in MINUTES (10); given again, it goes on where it stopped
#
# OUT/tests.txt gets what the tests said, once they have passed, OUT/card.jsonl the figures of
# benchmarks/card.py, OUT/{experiment} the results of the experiment, OUT/runs.txt the card, the
# versions, the commit and the time of each run. The experiment needs LATENT_REASONING_DATA and
# LATENT_REASONING_BASE (config/smollm2.yaml); without them it is left out. To try it on a CPU:
#
#   DEVICE=cpu SHAPES=tiny CONFIGS=config/test.yaml MINUTES=2 benchmarks/on_gpu.sh /tmp/out
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: benchmarks/on_gpu.sh OUT}")
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
end=$((SECONDS + 60 * ${MINUTES:-10}))
configs=${CONFIGS:-config/smollm2.yaml benchmarks/on_gpu.yaml}
export LATENT_REASONING_RESULTS=$out PYTHONPATH=$PWD/src:$PWD
mkdir -p "$out"

# Ends a command like Ctrl-C when the time is over: a training then writes a checkpoint.
within_time() {
    local left=$((end - SECONDS))
    if ((left < 5)); then
        echo "no time left for: $*"
        return 124
    fi
    timeout --signal=INT --kill-after=30 "$left" "$@"
}

{
    date --utc +%FT%TZ
    echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"
    "$python" -c 'import torch, transformers, peft; print("torch", torch.__version__,
        "transformers", transformers.__version__, "peft", peft.__version__)'
} >>"$out/runs.txt"

status=0
# The card's figures for the arguments.
measure() {
    within_time "$python" -m benchmarks --device "$device" --repetitions "${REPETITIONS:-2}" \
        --output "$out/card.jsonl" "$@" || status=$?
}

if [[ $device == cuda && ! -e $out/tests.txt ]]; then
    within_time "$python" -m pytest -q -n 0 -k "cuda or gpu" tests/runtime/test_graphs.py \
        tests/model/test_decoding.py tests/rl tests/sft/test_captured.py 2>&1 |
        tee "$out/tests.unfinished" && mv "$out/tests.unfinished" "$out/tests.txt" || status=$?
fi

for shape in ${SHAPES:-llama-1b smollm2}; do
    measure --shape "$shape" --micro-batch 64
done
if [[ $device == cuda ]]; then
    measure --shape smollm2 --micro-batch 128 --paths captured
fi

if [[ -n ${CONFIGS:-} || (-n ${LATENT_REASONING_DATA:-} && -n ${LATENT_REASONING_BASE:-}) ]]; then
    # shellcheck disable=SC2086  # the files are words of their own
    within_time "$python" -m snakemake --cores "${CORES:-4}" --rerun-incomplete --nolock \
        --configfile $configs -- ${TARGETS:-all} || status=$?
else
    echo "LATENT_REASONING_DATA or LATENT_REASONING_BASE is not set: no experiment"
fi
if [[ $device == cuda ]]; then
    measure --shape smollm2 --micro-batch 128 --paths compiled
fi
echo "ended after $SECONDS s with status $status" | tee -a "$out/runs.txt"
exit "$status"
