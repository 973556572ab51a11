#!/usr/bin/env bash
# The main job on a fresh machine: synthetic knee radiographs, a tiny MiniGPT-v2, 8 clients at 4 levels, 5 rounds.
# No download besides the packages, no GPU. Further options go to `scalefl train`, and win over those below.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install project .

exec "$venv/bin/python" -m scalefl train \
    --data synthetic --cfg_path tiny --num_clients 8 --num_rounds 5 \
    --num_epoch 10 --save_path "$root/runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
