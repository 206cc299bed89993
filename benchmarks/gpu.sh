#!/usr/bin/env bash
# Everything that needs a GPU, in steps that end on their own; what each printed goes to a file of its name.
#
#     benchmarks/gpu.sh OUTPUT_FOLDER STEP...
#
# Steps: tests check memcheck racecheck kernels tune decode long batch evict; without any, all of them in this order.
# An H100 or H200 takes a minute or two a step, "tune", "decode" and "batch" five to ten.
# LIMIT_GB is the memory that "batch" may take (130).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:?where should the output go?}
shift
mkdir -p "$out"
export PYTHONUNBUFFERED=1 NO_COLOR=1 COLUMNS=160
python=${PYTHON:-python}
fade=("$python" -m fade_core)
ours='regex=(decode|merge|append|encode|dequantize|mass|planes|turn|finish)_kernel'
failed=0

step() { # name, seconds, command...
    local name=$1 seconds=$2 begun=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$out/$name.txt" 2>&1
    local status=$?
    echo "$name: exit $status after $((SECONDS - begun)) s; $(tail -n 1 "$out/$name.txt")"
    ((status == 0)) || failed=1
}

# Out of bounds shows only where torch's allocator does not hand out parts of larger blocks.
sanitize() { PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" 900 compute-sanitizer --tool "$1" --kernel-regex "$ours" --error-exitcode 9 "${fade[@]}" check-kernels; }

run() {
    case $1 in
        tests) step tests 580 "$python" -m pytest -q -p no:cacheprovider plugins/fade_kernels_triton/tests -n 8 ;;
        check) step check 300 "${fade[@]}" check-kernels ;;
        memcheck | racecheck) sanitize "$1" ;;
        kernels) step kernels 580 "${fade[@]}" bench kernels --budget 500 --output-dir "$out/kernels" ;;
        tune) step tune 900 "${fade[@]}" bench tune --budget 800 --output "$out/decode-gpu.json" ;;
        decode)
            step decode-1 580 "${fade[@]}" bench decode --batch 1 --context 4096 --context 32768 --output-dir "$out/decode-1"
            step decode-8 580 "${fade[@]}" bench decode --batch 8 --context 4096 --context 32768 --output-dir "$out/decode-8"
            ;;
        long) step long 580 "${fade[@]}" bench decode --batch 1 --context 4096 --steps 1000 --output-dir "$out/long" ;;
        evict) step evict 580 "${fade[@]}" bench decode --batch 1 --context 4096 --config examples/evicting.toml --output-dir "$out/evict" ;;
        batch) step batch 580 "${fade[@]}" bench batch --context 32768 --limit "${LIMIT_GB:-130}" ;;
        *) echo "unknown step: $1" >&2 && failed=1 ;;
    esac
}

(($#)) || set -- tests check memcheck racecheck kernels tune decode long batch evict
for name; do run "$name"; done
exit "$failed"
