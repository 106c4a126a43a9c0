#!/usr/bin/env bash
# Everything that a GPU has to say, in at most nine minutes:
#
#     bash benchmarks/gpu.sh [FOLDER]          (default: benchmarks/results/gpu)
#
# It needs no network: a copy of the tree with the built library in fastscore/ (else it is built here, where there is an
# nvcc), and the torch that PYTHON (default: python) finds. Packages that this Python lacks may lie in a folder that DEPS
# names (`pip install --no-deps --target DEPS torch-pruning safetensors tqdm captum torchvision pytest matplotlib`).
# Each step has a time limit of its own and a file of its own; one that fails leaves the others' results. summary.txt
# says how each ended. Without a GPU it runs the same steps on small networks, to see that they run.
set -u
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu}
python=${PYTHON:-python}
budget=${BUDGET:-530} # seconds for all steps
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD${DEPS:+:$DEPS}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 FASTSCORE_RESULTS="$out"
start=$SECONDS
failed=0
: > "$out/summary.txt"

# step NAME LIMIT COMMAND...: into NAME.txt, for at most LIMIT seconds, or what is left of the budget
step() {
  local name=$1 limit=$2 began=$SECONDS left code
  shift 2
  left=$((budget - SECONDS + start))
  if [ "$left" -lt 5 ]; then
    printf '%-22s not begun: the %d seconds are used up\n' "$name" "$budget" | tee -a "$out/summary.txt"
    failed=$((failed + 1))
    return
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  FASTSCORE_UNTIL=$(($(date +%s) + limit * 3 / 4)) timeout --kill-after=5 "$limit" "$@" > "$out/$name.txt" 2>&1
  code=$?
  case $code in
    0) said=done ;;
    124 | 137) said="stopped after its $limit seconds" ;;
    *) said="failed ($code): $(grep -v '^ *$' "$out/$name.txt" | tail -n 1 | cut -c 1-120)" ;;
  esac
  [ "$code" -ne 0 ] && failed=$((failed + 1))
  printf '%-22s %4d s  %s\n' "$name" $((SECONDS - began)) "$said" | tee -a "$out/summary.txt"
}

device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")' 2> /dev/null || echo cpu)
if [ "$device" = cuda ]; then
  small=32 large=128 size=224 rounds=3 network=resnet50 networks="resnet50 mobilenet_v2 vit_b_16"
else
  small=2 large=4 size=64 rounds=1 network=resnet18 networks="resnet18"
fi

environment() {
  date -u
  nvidia-smi || echo "no nvidia-smi"
  "$python" -m torch.utils.collect_env || true
  ls fastscore/_C*.so 2> /dev/null || "$python" setup.py build_ext --inplace || exit 1
  "$python" -m fastscore info
}
export -f environment
export python

peers() { # WHAT TF32 BATCH CONTESTANTS...
  local what=$1 tf32=$2 batch=$3
  shift 3
  step "score-$what-$batch" 60 env NVIDIA_TF32_OVERRIDE="$tf32" "$python" -m benchmarks.peers --device "$device" \
    --layout channels_last --models $network --parts pass --batch "$batch" --size $size --repeats $rounds \
    --out "$out/score-$what-$batch" --contestants "$@"
}

ours=("Torch-Pruning, Taylor" "captum" "plain hooks" "forward and backward" "fastscore, random")
step environment 90 bash -c environment
FASTSCORE_BATCHES=32 step kernels 130 "$python" -m pytest -q -p no:cacheprovider -s benchmarks/ops/test_gpu.py
peers float32 0 $small "${ours[@]}"
peers float32 0 $large "${ours[@]}"
if [ "$device" = cuda ]; then peers tf32 1 $large "${ours[@]}"; fi
peers bfloat16 0 $large "Torch-Pruning, Taylor" "fastscore, bfloat16"
step profile 40 "$python" -m benchmarks.passes.profile_pass --device "$device" --layout channels_last --model $network \
  --batch $small --size $size --out "$out"
step training-step 45 "$python" -m benchmarks.passes.training_step --device "$device" --layout channels_last \
  --models $networks --batch $small --size $size --rounds $rounds --layers 20
step checks 200 "$python" -m pytest -q -p no:cacheprovider benchmarks/ops/test_gpu_checks.py
step pipeline 150 "$python" -m pytest -q -p no:cacheprovider benchmarks/passes/test_gpu_pipeline.py

printf '%d s in all, %d steps failed; everything is in %s\n' $((SECONDS - start)) "$failed" "$out" \
  | tee -a "$out/summary.txt"
[ "$failed" -eq 0 ]
