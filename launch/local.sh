#!/usr/bin/env bash
# A run on this machine, started by one process. Arguments go to `scalefl train`.
#   bash launch/local.sh --save_path FOLDER ...                    clients one after the other in that process
#   bash launch/local.sh --executor jobs --save_path FOLDER ...    clients in processes of their own
#
# As jobs, as many clients train at a time as there are GPUs, or cores; --max_jobs limits them. A level whose
# clients want several GPUs, or a launch of their own (ZeRO), has them in --level_resources FILE:
#   4: {gpus: 2, processes: 2, accelerate_config: accelerate_configs/zero3.yaml}
# --dry_run prints what would be launched.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_project

exec "$python" -m scalefl train "$@"
