#!/usr/bin/env bash
# A run on all GPUs of this machine. Arguments go to `scalefl train`.
#   bash launch/multi_gpu.sh --save_path FOLDER ...                        they train each client together
#   bash launch/multi_gpu.sh --executor parallel --save_path FOLDER ...    each trains clients of its own
#
# PROCESSES: how many, unset: one a GPU. CPU=1: on the CPU. ACCELERATE_CONFIG: such as
# accelerate_configs/zero3.yaml, unset: DDP. The same by torchrun, with the GPUs counted by hand:
#   torchrun --standalone --nproc_per_node 2 -m scalefl train --save_path FOLDER ...
set -euo pipefail

gpus=0
if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)"
elif nvidia-smi -L >/dev/null 2>&1; then
    gpus="$(nvidia-smi -L | grep -c '^GPU')"
fi
on_cpu="$([[ "${CPU:-}" != 1 ]] || echo yes)"
processes="${PROCESSES:-$gpus}"
if [[ -z "$on_cpu" && "$gpus" == 0 ]]; then
    echo "launch/multi_gpu.sh: no CUDA GPU was found; expected one, or PROCESSES=2 CPU=1 for two processes" \
        "on the CPU." >&2
    exit 2
elif [[ ! "$processes" =~ ^[1-9][0-9]*$ || (-z "$on_cpu" && "$processes" -gt "$gpus") ]]; then
    echo "launch/multi_gpu.sh: PROCESSES: got '$processes' with $gpus GPU(s); expected a number from 1 on," \
        "and no more than there are GPUs unless CPU=1." >&2
    exit 2
fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_project

if [[ -n "$on_cpu" ]]; then
    set -- --use_gpu 0 "$@"
    [[ -n "${ACCELERATE_CONFIG:-}" ]] || export ACCELERATE_USE_CPU=true # --multi_gpu is DDP on CPUs then
fi
launch=(--num_processes "$processes" --num_machines 1 --main_process_port 0)
if [[ -n "${ACCELERATE_CONFIG:-}" ]]; then
    launch+=(--config_file "$ACCELERATE_CONFIG")
elif ((processes > 1)); then
    launch+=(--multi_gpu --mixed_precision no --dynamo_backend no)
else
    exec "$python" -m scalefl train "$@"
fi
exec "$python" -m accelerate.commands.launch "${launch[@]}" -m scalefl train "$@"
