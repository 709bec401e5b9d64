#!/usr/bin/env bash
# Everything that needs a GPU, in one go, some ten minutes: build, tests, sanitizers, benchmarks, a profile.
#
#   benchmarks/run_gpu.sh OUT [PART ...]
#
# Parts: check (tests, side by side), sanitize, profile, speed; all of them where none is named, none of them where a first
# quick test fails. Leaves logs, JSON, the golden vectors of the conformance tests and a summary in OUT. Uses
# the python on PATH (set PYTHON for another), which needs a torch that sees the GPU; nvcc must be there. Exits non-zero
# if a step failed, after having run the others.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/run_gpu.sh OUT [check] [sanitize] [profile] [speed]}")
shift
parts=" ${*:-check sanitize profile speed} "
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p "$out"
: >"$out/summary.txt"
failed=$(mktemp)

step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    local start=$SECONDS rc=0
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 || rc=$?
    [ $rc -eq 0 ] || echo "$name" >>"$failed"
    echo "$name: exit $rc, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null
arch=$("$python" -c 'import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + ("a" if major == 9 else ""))')
export ROSAQ_CUDA_ARCHS=$arch ROSAQ_BUILD=cuda

# In place and without isolation: the machine may reach no package registry.
step build 240 "$python" setup.py build_ext --inplace
export PYTHONPATH=$PWD:${PYTHONPATH:-}

# A kernel that hangs would take the time of everything after it.
step quick 60 "$python" -m pytest -q -x tests/gpu/test_ops_gpu.py -k identity
if grep -q quick "$failed"; then
    tail -n 20 "$out/quick.log"
    exit 1
fi

if [[ $parts == *" check "* ]]; then
    # The references are float64 on the CPU: with all threads in every worker they would wait for each other.
    export OMP_NUM_THREADS=2
    step conformance 90 "$python" -m pytest -q -m gpu tests/gpu/test_conformance.py &
    step ops 200 "$python" -m pytest -q -n 6 tests/gpu/test_ops_gpu.py &
    step panels 90 "$python" -m pytest -q tests/gpu/test_panels_gpu.py &
    step model 150 "$python" -m pytest -q -n 2 tests/gpu/test_model_gpu.py &
    step quantize 150 "$python" -m pytest -q -n 4 tests/gpu/test_quantize_gpu.py &
    wait
    unset OMP_NUM_THREADS
    [ -d tests/gpu/golden ] && cp -r tests/gpu/golden "$out/"
fi
if [[ $parts == *" sanitize "* ]]; then
    # racecheck ends with an error of its own in launches whose blocks wait for each other.
    for tool in memcheck synccheck racecheck; do
        tests="as_good or captured_graph"
        [ $tool = racecheck ] && tests="few_and_many or identity"
        step "$tool" 150 compute-sanitizer --tool "$tool" --kernel-name kernel_substring=rosaq --error-exitcode 9 \
            "$python" -m pytest -q -x tests/gpu/test_ops_gpu.py -k "$tests" &
    done
    wait
fi
if [[ $parts == *" profile "* ]]; then
    step profile 100 ncu --clock-control none --set full -k regex:gemm_kernel \
        "$python" benchmarks/bench_gemm.py --once --shapes 4096x4096 8192x8192 --m 1 16 64
fi
if [[ $parts == *" speed "* ]]; then
    step gemm 200 "$python" benchmarks/bench_gemm.py --out "$out/gemm.json" --m 1 8 16 24 64 128 256
    # In a process of their own: a rival that breaks the device must not cost the rest.
    step rivals 200 "$python" benchmarks/bench_gemm.py --rivals --out "$out/rivals.json" --m 1 16 64
    step decode 150 "$python" benchmarks/bench_decode_gpu.py --out "$out/decode.json"
    step quantize_speed 150 "$python" benchmarks/bench_quantize_gpu.py --out "$out/quantize.json"
fi
cat "$out/summary.txt"
[ ! -s "$failed" ]
