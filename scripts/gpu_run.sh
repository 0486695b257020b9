#!/usr/bin/env bash
# Everything that needs a GPU, each stage inside a time limit, results written as they come:
#
#     scripts/gpu_run.sh check|bench|train OUT [SECONDS]
#
# check: the GPU tests, and each kind of training for a few seconds, at the same time; it also fills the compiler's cache.
# bench: benchmarks.gpu, alone on the card.
# train: cifar10-fast, and beside it for half of the time the text and digits models; then their bfloat16 weights (in parts
#        of 15 MB, put together by `cat`) and the feature moments of samples of CIFAR-10.
#
# DATA is a folder with cifar10/ and mnist/ (parquet files) and tinyshakespeare.txt. RUNS keeps state between stages. TINY=1 tries the script on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
STAGE=${1:?check, bench or train}; OUT=${2:?a folder}; SECONDS_GIVEN=${3:-}
DATA=${DATA:-data}; RUNS=${RUNS:-runs/gpu}; PYTHON=${PYTHON:-python3}; TINY=${TINY:-}
export PYTHONPATH="$PWD/src:$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR="$PWD/$RUNS/inductor" TRITON_CACHE_DIR="$PWD/$RUNS/triton" MPLBACKEND=Agg
LOGS="$RUNS/logs"
mkdir -p "$OUT" "$LOGS" "$TORCHINDUCTOR_CACHE_DIR" "$TRITON_CACHE_DIR"
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
DEVICE=cuda; BATCH=512; COMPILE=--compile; SAMPLES=10000
if [ -n "$TINY" ]; then DEVICE=cpu; BATCH=4; COMPILE=--no-compile; SAMPLES=8; fi

ddim() { "$PYTHON" -m ddim "$@"; }
say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }
# Runs a command in the background with its output in a file.
background() { local log=$1; shift; "$@" >"$LOGS/$log.txt" 2>&1 & }

cifar() { # folder, seconds
  local small=()
  [ -n "$TINY" ] && small=(--limit 64 --set network.channels=32 --set network.multipliers='[1,2]' --set network.blocks=1 --set network.head_channels=32)
  ddim train "$DATA/cifar10" --preset cifar10-fast --budget "$2s" --batch $BATCH $COMPILE --device $DEVICE --out "$1" \
    --checkpoint-every 5000 --preview-every 0 ${small[@]+"${small[@]}"}
}
text() { # folder, seconds, noise, further options
  local small=() folder=$1 seconds=$2 noise=$3; shift 3
  [ -n "$TINY" ] && small=(--set network.width=32 --set network.depth=1)
  [ -n "$TINY" ] || small=(--set network.width=256 --set network.depth=5 --set network.dropout=0.1)
  ddim train "$DATA/tinyshakespeare.txt" --preset tinyshakespeare --budget "${seconds}s" --batch $((BATCH / 4)) $COMPILE --device $DEVICE \
    --lr 2e-3 --warmup 500 --set categorical.pi="$noise" --set train.weight_decay=0.05 --set train.ema_half_life=0.05 \
    --set train.decay_fraction=0.6 --checkpoint-every 2000 --preview-every 0 "${small[@]}" --out "$folder" "$@"
}
digits() { # folder, seconds
  local small=()
  [ -n "$TINY" ] && small=(--limit 64)
  ddim train "$DATA/mnist" --preset mnist --budget "$2s" --batch $((BATCH / 2)) $COMPILE --device $DEVICE --warmup 1000 \
    --set train.ema_half_life=0.05 --set train.decay_fraction=0.6 --checkpoint-every 2000 --preview-every 0 ${small[@]+"${small[@]}"} --out "$1"
}
# The bfloat16 weights of a run, in parts of 15 MB.
kept() { # name, run
  if [ -e "$2/model" ]; then
    rm -rf "$RUNS/kept-$1"
    ddim convert "$2" --out "$RUNS/kept-$1" --dtype bfloat16 >"$LOGS/$1.convert.txt" 2>&1
    tar -C "$RUNS" -cf - "kept-$1" | split -b 15m - "$OUT/$1.tar."
  fi
}

# Logs, metrics and tables so far.
results() { tar -C "$RUNS" -cJf "$OUT/results.tar.xz" $(cd "$RUNS"; ls -d logs table */metrics.jsonl */run.json 2>/dev/null); }

case $STAGE in
check)
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  T=${SECONDS_GIVEN:-75}
  background warm cifar "$RUNS/warm-cifar10" "$T"
  background warm-mask text "$RUNS/warm-mask" "$T" mask --set categorical.carry_over=true --loss-weight vlb
  "$PYTHON" -m pytest tests/test_gpu.py $(ls tests/test_device_noise.py tests/test_cuda_norm.py 2>/dev/null) -n 0 -o addopts= -q -x --maxfail=20 2>&1 | tee "$LOGS/pytest.txt" | tail -40
  say "tests are done"
  wait
  tail -n 3 "$LOGS"/warm*.txt
  tar -C "$RUNS" -cJf "$OUT/inductor.tar.xz" inductor triton 2>/dev/null; ls -la "$OUT"
  ;;
bench)
  T=${SECONDS_GIVEN:-240}
  if [ -n "$TINY" ]; then "$PYTHON" -m benchmarks.gpu --device cpu --tiny --minutes 2 --out "$OUT/gpu.json" | tail -60
  else "$PYTHON" -m benchmarks.gpu --minutes "$(awk "BEGIN{print $T/60}")" --out "$OUT/gpu.json" --commit "$COMMIT" 2>&1 | tee "$LOGS/bench.txt" | tail -150; fi
  ;;
train)
  T=${SECONDS_GIVEN:-300}
  background text-mask text "$RUNS/text-mask" $((T / 2)) mask --set categorical.carry_over=true --loss-weight vlb
  background text-uniform text "$RUNS/text-uniform" $((T / 2)) uniform
  background digits digits "$RUNS/digits" $((T / 2))
  background cifar10 cifar "$RUNS/cifar10" "$T"
  wait
  say "trainings are done"
  for name in text-mask text-uniform digits cifar10; do tail -n 2 "$LOGS/$name.txt"; kept $name "$RUNS/$name" & done
  wait
  results
  say "weights are kept"
  for cell in "10,20 $SAMPLES" "50 $((SAMPLES / 2))"; do
    set -- $cell
    ddim evaluate "$RUNS/cifar10" "$DATA/cifar10" ${TINY:+--limit 64} -n "$2" --steps "$1" --eta 0,1 --label each --micro-batch $BATCH \
      --device $DEVICE --out "$RUNS/table" 2>&1 | tail -n 12 | tee "$LOGS/table-$1.txt"
    say "S = $1 evaluated"
  done
  results
  ls -la "$OUT"
  ;;
*) echo "error: stage $STAGE: is unknown; choose check, bench or train" >&2; exit 2 ;;
esac
say "done"
