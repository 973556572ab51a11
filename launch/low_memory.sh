#!/usr/bin/env bash
# One small GPU: MiniGPT-v2 in full size, its language model frozen in 4 bits; adapters, projector and exit
# norms are trained. Further options go to `scalefl train`, and win over those below:
#   bash launch/low_memory.sh MODEL_FOLDER DATA_FOLDER [OPTION ...]
#
# Predicted by `scalefl plan`, whole round of four levels at 448 pixels: 4.6 GB as it is, so it fits 8 GB;
# docs/memory.md has settings for 12, 16 and 24 GB.
set -euo pipefail

model="${1:-}" data="${2:-}"
if [[ ! -d "$model" || ! -d "$data" ]]; then
    echo "launch/low_memory.sh: got model folder '$model' and data folder '$data'; expected two folders that" \
        "exist: bash launch/low_memory.sh MODEL_FOLDER DATA_FOLDER [OPTION ...]" >&2
    exit 2
fi
shift 2

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install project .

# Smaller weights: nf4, double_quant. Smaller activations: bf16, gradient_checkpointing, one example a pass.
# The vision tower runs once per image (feature_cache); 8-bit state of the optimizer pages to the host.
exec "$venv/bin/python" -m scalefl train \
    --cfg_path minigpt_v2 --init_from "$model" --data_root "$data" --tuning lora \
    --quantization nf4 --double_quant --precision bf16 --gradient_checkpointing --feature_cache file \
    --optimizer paged_adamw_8bit --micro_batch_size 1 --batch_size 8 \
    --save_path "$root/runs/low-memory-$(date +%Y%m%d-%H%M%S)" "$@"
