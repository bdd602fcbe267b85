#!/usr/bin/env bash
# What only a GPU can show, in three stages of under ten minutes each. Results go to $OUT (default bench/results).
#
#   bash bench/gpu_check.sh 1    predicted against actual time and memory, models of 1.7, 3 and 8 B parameters
#   bash bench/gpu_check.sh 2    plan tune, then recommended as written and tuned: time and loss of both
#   bash bench/gpu_check.sh 3    fp16, bf16 and packing are right
#
# PYTHON names the interpreter, GSM8K the data (a JSONL file with question and answer).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stage="${1:?name a stage: 1, 2 or 3}"
python="${PYTHON:-python3}"
out="${OUT:-bench/results}"
day="$(date -u +%F)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
data=()
[ -n "${GSM8K:-}" ] && data=(--data "$GSM8K")

if [ "${DEVICE:-cuda}" = cuda ] && ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: torch sees no CUDA device here; nothing was checked." >&2
  exit 3
fi
mkdir -p "$out"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,temperature.gpu,power.draw --format=csv \
  | tee "$out/gpu-$day-$stage.csv"

device="${DEVICE:-cuda}" # DEVICE=cpu SHAPE=qwen3-6m LIMIT=60 tries the script itself where there is no GPU
shape="${SHAPE:-qwen3-1.7b}"
limit="${LIMIT:-1500}"
precision=()
[ "$device" = cuda ] && precision=(--precision bf16)

headline() { # tune, then run as written and tuned: the same global batch, the same data; loss and time of both
  local work plan mode
  work="$(mktemp -d)"
  export PLAN_HOME="$work/home"
  "$python" - "$device" "$shape" "$work/model" <<'PY' || return 1
import sys
from pathlib import Path
sys.path.insert(0, "bench")
import accuracy
device, shape, folder = sys.argv[1:]
accuracy.make_model({**accuracy.CPU_SHAPES, **accuracy.GPU_SHAPES}[shape], Path(folder), weights_on=device)
PY
  plan=("$python" -P -m planner.cli)
  local common=(--model "$work/model" --dataset "${GSM8K:?name the data}" --columns prompt=question,completion=answer
    --device "$device" --limit "$limit" --budget "${BUDGET:-20}" "${precision[@]}")
  "${plan[@]}" tune recommended "${common[@]}" 2>&1 | tee "$out/tune-$device-$day.txt"
  for mode in written tuned; do
    "${plan[@]}" --run recommended "${common[@]}" $([ $mode = tuned ] && echo --tuned) --output "$work/$mode" || return 1
    cp "$work/$mode/record.json" "$out/headline-$mode-$device-$day.json"
  done
}

case "$stage" in
  1) "$python" bench/accuracy.py --device "$device" --budget 30 --minutes 7.5 --out "$out/accuracy-$device-$day.json" "${data[@]}" ;;
  2) headline ;;
  3)
    "$python" -m pytest -q -m gpu -p no:cacheprovider tests 2>&1 | tee "$out/gpu-tests-$day.txt"
    exit "${PIPESTATUS[0]}"
    ;;
  *) echo "gpu_check: no stage '$stage'; there are 1, 2 and 3." >&2; exit 2 ;;
esac
