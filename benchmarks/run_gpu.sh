#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under nine minutes: build, tests, sanitizers, benchmark.
#
#   benchmarks/run_gpu.sh OUT
#
# Leaves logs, JSON, the golden vectors of the conformance tests and a summary in OUT. Uses the python on PATH (set
# PYTHON for another), which needs a torch that sees the GPU; nvcc must be there. Exits non-zero if a step failed, after
# having run the others.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/run_gpu.sh OUT}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p "$out"
: >"$out/summary.txt"
failed=0

step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    local start=$SECONDS rc=0
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || rc=$?
    [ $rc -eq 0 ] || failed=1
    echo "$name: exit $rc, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null
arch=$("$python" -c 'import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + ("a" if major == 9 else ""))')
export ROSAQ_CUDA_ARCHS=$arch ROSAQ_BUILD=cuda

# In place and without isolation: the machine may reach no package registry.
step build 240 "$python" setup.py build_ext --inplace
export PYTHONPATH=$PWD:${PYTHONPATH:-}
step conformance 90 "$python" -m pytest -q tests/gpu/test_conformance.py
[ -d tests/gpu/golden ] && cp -r tests/gpu/golden "$out/"
step ops 150 "$python" -m pytest -q tests/gpu/test_ops_gpu.py
for tool in memcheck racecheck synccheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -q -x tests/gpu/test_ops_gpu.py -k "captured_graph or repacking or index"
done
step bench_gemm 200 "$python" benchmarks/bench_gemm.py --out "$out/gemm.json" --m 1 8 16 32 64 256
cat "$out/summary.txt"
exit $failed
