#!/usr/bin/env bash
# One small GPU: MiniGPT-v2 in full size, its language model frozen in 4 bits; adapters, projector and exit
# norms are trained. Further options go to `scalefl train`, and win over those below:
#   bash launch/low_memory.sh MODEL_FOLDER DATA_FOLDER [OPTION ...]
#
# MODEL_FOLDER: a MiniGPT-v2 in Hugging Face's format: `scalefl convert` makes one of the released weights.
# DATA_FOLDER: radiographs, as the README lays them out.
#
# Predicted by `scalefl plan`, whole round of four levels at 448 pixels: 4.6 GB as it is, so it fits 8 GB;
# docs/memory.md has settings for 12, 16 and 24 GB.
set -euo pipefail

refuse() {
    echo "launch/low_memory.sh: $1" >&2
    exit 2
}

usage="bash launch/low_memory.sh MODEL_FOLDER DATA_FOLDER [OPTION ...]"
model="${1:-}" data="${2:-}"
if [[ ! -d "$model" || ! -d "$data" ]]; then
    refuse "got model folder '$model' and data folder '$data'; expected two folders that exist: $usage"
fi
if [[ ! -f "$model/config.json" ]]; then
    refuse "$model: no config.json there; expected a MiniGPT-v2 that save_pretrained wrote."
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
    refuse "no CUDA GPU was found (nvidia-smi -L names none); expected one, or a driver that is in order."
fi
shift 2

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install project .

# Smaller weights: nf4. Smaller activations: bf16, gradient_checkpointing, one example a pass.
# The vision tower runs once per image, for all runs (feature_cache, feature_folder); 8-bit state of the
# optimizer pages to the host. Evaluation takes few rows at once (eval_batch_size).
exec "$venv/bin/python" -m scalefl train \
    --cfg_path minigpt_v2 --init_from "$model" --data_root "$data" --tuning lora --use_gpu \
    --quantization nf4 --precision bf16 --gradient_checkpointing \
    --feature_cache file --feature_folder "$root/runs/features" \
    --optimizer paged_adamw_8bit --micro_batch_size 1 --batch_size 8 --eval_batch_size 8 \
    --save_path "$root/runs/low-memory-$(date +%Y%m%d-%H%M%S)" "$@"
