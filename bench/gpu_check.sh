#!/usr/bin/env bash
# What only a GPU can show, in three stages of under ten minutes each. Results go to $OUT (default bench/results).
#
#   bash bench/gpu_check.sh 1    predicted against actual time and memory, models of 1 to 8 B parameters
#   bash bench/gpu_check.sh 2    the headline: baseline as published against presets as written and tuned, time and loss
#   bash bench/gpu_check.sh 3    fp16, bf16 and packing are right; then this trainer beside TRL and Transformers' Trainer
#
# Importing the libraries takes a bare machine 10 to 20 s a process: the benches fork theirs from one that has them.
# Stage 1 has twelve pairs of some 65 s (16 s of it the profile, BUDGET, and loops of 22 to 36 s, SCALE), of which seven fit. A
# second call on the same day with the same OUT goes on where the first stopped. ONLY names cases by their numbers, KEEP a folder
# for what each pair measured.
# Seen on an H200 (2026-11-27): launching kernels sets the pace below some 6,000 tokens a micro-step (3 to 5 ms a layer, and the
# host's speed moves), and the first seconds of a process are slower while kernels are loaded. Teaching the model takes 20 s, a
# search for both presets 90 s, a seed without the leaking packer another two minutes.
#
# PYTHON names the interpreter, GSM8K the data (a JSONL file with question and answer), WORK a folder for models that the
# stages share; in memory by default, since writing 16 GB to a disk makes the first checkpoints slow.
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
work="${WORK:-$([ -d /dev/shm ] && echo /dev/shm || echo /tmp)/gpu-check}"
mkdir -p "$out" "$work/headline"
# As worker and trainer set it; but a fork comes after torch may have read it.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,temperature.gpu,power.draw --format=csv \
  | tee "$out/gpu-$day-$stage.csv"

device="${DEVICE:-cuda}" # DEVICE=cpu tries the script itself where there is no GPU
socket="$(mktemp -d)/preloaded"
trap 'kill "$server" 2>/dev/null' EXIT
preload() {
  "$python" bench/preloaded.py serve "$socket" 2>"$socket.log" &
  server=$!
  for _ in $(seq 240); do grep -q "preloaded: ready" "$socket.log" && break; sleep 0.5; done
  export PRELOADED="$socket"
}
server=""

case "$stage" in
  1)
    preload
    # A case of each model, so that all are made at once while the tests run.
    makers=()
    for one in ${FIRST:-$([ "$device" = cuda ] && echo 0 1 2 4 || echo 0 4 7)}; do
      bench/preloaded.py bench/accuracy.py --device "$device" --prepare --only "$one" --models "$work/models" "${data[@]}" >/dev/null &
      makers+=("$!")
    done
    bench/preloaded.py -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py 2>&1 | tee "$out/gpu-tests-$day.txt" | tail -3
    tested="${PIPESTATUS[0]}"
    for maker in "${makers[@]}"; do wait "$maker"; done
    bench/preloaded.py bench/accuracy.py --device "$device" --budget "${BUDGET:-16}" --scale "${SCALE:-1.9}" \
      --samples 0 --seed "${SEED:-1}" --minutes "${MINUTES:-7.3}" --models "$work/models" ${ONLY:+--only "$ONLY"} \
      ${KEEP:+--keep "$KEEP"} --out "$out/accuracy-$device-$day.json" "${data[@]}"
    exit "$tested"
    ;;
  2)
    preload
    bench/preloaded.py bench/headline.py --device "$device" --seeds "${SEEDS:-1}" --rows "${ROWS:-192}" --budget 12 \
      --steps 8 --minutes "${MINUTES:-8}" --work "$work/headline" --out "$out/headline-$device-$day.json"
    ;;
  3)
    "$python" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py 2>&1 | tee "$out/gpu-tests-$day.txt"
    tested="${PIPESTATUS[0]}"
    preload
    taught=()
    [ -f "$work/headline/taught/config.json" ] && taught=(--model "$work/headline/taught")
    bench/preloaded.py bench/waiting.py --device "$device" "${taught[@]}" --out "$out/waiting-$device-$day.json" "${data[@]}"
    bench/preloaded.py bench/beginning.py --device "$device" --length 8192 "${taught[@]}" \
      --out "$out/beginning-$device-$day.json"
    bench/preloaded.py bench/launch.py --device "$device" "${taught[@]}" --out "$out/launch-$device-$day.json"
    bench/preloaded.py bench/peers.py --device "$device" --rounds "${ROUNDS:-2}" --rows "${ROWS:-520}" "${taught[@]}" \
      --out "$out/peers-$device-$day.json"
    exit "$tested"
    ;;
  *) echo "gpu_check: no stage '$stage'; there are 1, 2 and 3." >&2; exit 2 ;;
esac
