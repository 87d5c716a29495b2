#!/usr/bin/env bash
# Everything that needs a GPU, in one command on a bare machine with torch, triton and, for some peers, wheels of its own:
#   benchmarks/gpu_run.sh [--dry] [PART ...]
# Parts: build tests sanitizer tiles ceilings attention rows lse backward references masks layer unet operators report
# (default: all, about 9 minutes without the part masks, which was not timed yet, and some more with the wheels below,
# whose kernels are compiled at their first call).
# Results go to $OUT (default: a dated folder under benchmarks/results): a CSV and a log per part, and parts.csv, which
# says of every part whether it ran, how long it took, and why not. --dry: for a machine without a GPU. Kernels are
# interpreted at toy sizes, nothing is timed, tests are only collected, and the part sanitizer does not run.
#
# The part build installs all wheels in the folder $WHEELS (default: wheels) without their dependencies. For Python 3.12
# and CUDA 13 this brings FlashAttention-3 and -4 and cuDNN's frontend into .whl, which git ignores: 135 MiB with what
# they need beside torch, 88 MiB of that the compiler nvidia-cutlass-dsl-libs-cu13:
#   python3 -m pip download -d .whl --no-deps --only-binary :all: --python-version 3.12 \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
#     fa3-fwd==0.0.3 flash-attn-4==4.0.0b36 nvidia-cudnn-frontend==1.32.0 nvidia-cutlass-dsl==4.8.1 \
#     nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1 \
#     quack-kernels==0.6.5 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5 einops==0.8.1
# They import numpy, cuda-bindings, protobuf and typing-extensions too. A peer that breaks the process ends its part, and
# the log names it: uninstall it and run the part again.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
OUT=${OUT:-benchmarks/results/gpu-$(date +%Y-%m-%d-%H%M)}
DRY=()
PARTS=()
for argument in "$@"; do
  if [ "$argument" = --dry ]; then DRY=(--dry); else PARTS+=("$argument"); fi
done
[ ${#PARTS[@]} -gt 0 ] || PARTS=(build tests sanitizer tiles ceilings attention rows lse backward references masks layer unet operators report)
mkdir -p "$OUT"
echo "part,status,seconds,reason" > "$OUT/parts.csv"

not_run() { echo "$1,not run,0,$2" >> "$OUT/parts.csv"; echo "== $1: not run: $2"; }

# run PART SECONDS COMMAND...: log under $OUT, one line in parts.csv
run() {
  local part=$1 limit=$2 start=$SECONDS status
  shift 2
  [ ${#DRY[@]} -eq 0 ] || limit=0  # limits save the time of a lent card; a dry run has none, however slow the machine
  echo "== $part"
  timeout "$limit" "$@" > "$OUT/$part.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    echo "$part,ok,$((SECONDS - start))," >> "$OUT/parts.csv"
  elif [ $status -eq 124 ]; then
    echo "$part,failed,$((SECONDS - start)),longer than $limit s" >> "$OUT/parts.csv"
  else
    echo "$part,failed,$((SECONDS - start)),exit status $status; see $part.log" >> "$OUT/parts.csv"
  fi
  tail -n 3 "$OUT/$part.log"
}

GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2> /dev/null)
[ -n "$GPU" ] || [ ${#DRY[@]} -gt 0 ] || { echo "no CUDA device here; --dry runs everything but the launches"; exit 1; }
echo "device: ${GPU:-none}, results: $OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

for part in "${PARTS[@]}"; do
  case $part in
    build)
      if [ -d "$WHEELS" ]; then "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl > "$OUT/wheels.log" 2>&1 || not_run wheels "see wheels.log"; fi
      run build 150 "$PYTHON" setup.py -q build_ext --inplace ;;
    tests)
      if ! "$PYTHON" -c "import pytest, hypothesis" 2> /dev/null; then not_run tests "pytest or hypothesis is missing: put wheels into $WHEELS"; continue; fi
      # Those that take the fixture `device`, which is the GPU where there is one.
      mapfile -t GPU_TESTS < <(grep -lE 'usefixtures\("device"|def test_.*[(, ]device[,)]' tests/test_*.py | grep -v diffusers)
      GPU_TESTS+=(tests/test_gpu.py tests/test_triton_replay.py)
      if [ ${#DRY[@]} -gt 0 ]; then
        run tests 300 "$PYTHON" -m pytest -p no:cacheprovider "${GPU_TESTS[@]}" --collect-only -q
      else
        WORKERS=()
        if "$PYTHON" -c "import xdist" 2> /dev/null; then WORKERS=(-n "$(nproc)"); fi
        run tests 240 "$PYTHON" -m pytest -p no:cacheprovider "${WORKERS[@]}" "${GPU_TESTS[@]}"
      fi ;;
    sanitizer)
      if ! command -v compute-sanitizer > /dev/null; then not_run sanitizer "compute-sanitizer is not installed"; continue; fi
      if [ ${#DRY[@]} -gt 0 ]; then not_run sanitizer "needs a GPU"; continue; fi
      run sanitizer 120 compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -p no:cacheprovider tests/test_gpu.py -k sanitizer ;;
    tiles)
      if [ ${#DRY[@]} -gt 0 ]; then
        TRITON_INTERPRET=1 run tiles 120 "$PYTHON" -m lr_kernels.triton.tune --few 2 --head-dim 64 --out "$OUT"
      else
        run tiles 150 "$PYTHON" -m lr_kernels.triton.tune --kind dense gathered --processes "$(nproc)" --out "$OUT"
      fi ;;
    attention | backward | masks)  # FlashAttention-4 compiles 20, 10 and 7 kernels for some seconds each
      run "$part" 420 "$PYTHON" -m benchmarks.gpu "$part" "${DRY[@]}" --out "$OUT" ;;
    ceilings | rows | lse | references | layer | unet | operators)
      run "$part" 240 "$PYTHON" -m benchmarks.gpu "$part" "${DRY[@]}" --out "$OUT" ;;
    report)
      if ! "$PYTHON" -c "import matplotlib" 2> /dev/null; then not_run report "matplotlib is missing"; continue; fi
      run report 60 "$PYTHON" -m benchmarks.gpu_report "$OUT" ;;
    *) not_run "$part" "no such part" ;;
  esac
done
echo "== $OUT/parts.csv"
cat "$OUT/parts.csv"
! grep -q ",failed," "$OUT/parts.csv"
