# Sourced by the batch scripts beside it: how a run is launched, stopped, and goes on.
#
# SLURM sends USR1 to the batch script ahead of the time limit (#SBATCH --signal), and on preemption where
# SlurmctldParameters has preempt_send_user_signal. The script passes it on to every process of the run, which
# writes a checkpoint and ends; then it requeues the job. Where that took longer than there was time, or SLURM
# preempts without a signal, the job is requeued too, and goes on from the last checkpoint before.
# `scancel` ends it for good.
#
# Processes ignore USR1 from their start (`trap '' USR1`: what is ignored stays ignored in programs that are
# started) until they can meet it, so it is sent again and again.
set -euo pipefail

asked="" terminated="" at_limit=""
trap 'asked=yes' USR1
trap 'on_terminate' TERM

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${SCALEFL_PYTHON:-$root/.venv/bin/python}"
restarts="${SLURM_RESTART_COUNT:-0}"
UNFINISHED=75 # exit code of what stopped before its end and can be resumed

say() { echo "launch/slurm: $*" >&2; }
refuse() {
    say "$*"
    exit 2
}

# Sets `arguments` to those of `scalefl train`: what was typed after --, and --resume.
read_arguments() {
    local typed saves="" resumes=""
    [[ "${1:-}" != -- ]] || shift
    arguments=("$@")
    for typed; do
        case "${typed//-/_}" in
            __save_path | __save_path=*) saves=yes ;;
            __resume | __resume=*) resumes=yes ;;
        esac
    done
    [[ -n "$saves" ]] || refuse "no --save_path among the arguments; expected the folder in which the run" \
        "goes on after a requeue: sbatch launch/slurm/NAME.sbatch -- --save_path FOLDER ..."
    [[ -n "$resumes" ]] || arguments+=(--resume)
    [[ -x "$python" ]] || refuse "$python: no such program; expected the project's environment, which" \
        "bash launch/local.sh --help makes, or SCALEFL_PYTHON=/path/to/python"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}

# One `accelerate launch` a node, whose processes train each client together (or, with --executor parallel,
# clients of their own); one process alone needs none.
train_on_nodes() {
    local nodes processes cpus host=FIRST_HOST step launch
    nodes="${SLURM_JOB_NUM_NODES:-$(sed -n 's/^#SBATCH --nodes=\([0-9]*\).*/\1/p' "$0")}"
    processes="${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}"
    [[ "$processes" =~ ^[1-9][0-9]*$ ]] || refuse "PROCESSES: got '$processes'; expected a number from 1 on"
    [[ -z "${ACCELERATE_CONFIG:-}" || -f "$ACCELERATE_CONFIG" ]] || refuse "ACCELERATE_CONFIG: no file" \
        "$ACCELERATE_CONFIG; expected one such as accelerate_configs/zero3.yaml"
    cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cpus > processes ? cpus / processes : 1))}"
    if on_cpu; then
        arguments=(--use_gpu 0 "${arguments[@]}")
        [[ -n "${ACCELERATE_CONFIG:-}" ]] || export ACCELERATE_USE_CPU=true # --multi_gpu is DDP on CPUs then
    fi
    # Not with srun's own task for each process: the launcher starts them, alike with and without SLURM.
    step=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --export=ALL --wait=60)
    [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || step+=(--cpus-per-task="$cpus")
    if ((nodes * processes == 1)); then
        run "${step[@]}" bash -c 'trap "" USR1; exec "$0" "$@"' "$python" -m scalefl train "${arguments[@]}"
    fi
    if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
        host="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    fi
    launch=(--num_machines "$nodes" --num_processes "$((nodes * processes))" --main_process_ip "$host")
    launch+=(--main_process_port "$((10000 + ${SLURM_JOB_ID:-0} % 20000))") # jobs that share a node differ
    if [[ -n "${ACCELERATE_CONFIG:-}" ]]; then
        launch+=(--config_file "$ACCELERATE_CONFIG")
    else
        launch+=(--multi_gpu --mixed_precision no --dynamo_backend no)
    fi
    # (SLURM_NODEID is each task's own.)
    run "${step[@]}" \
        bash -c 'trap "" USR1; exec "$0" -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" "$@"' \
        "$python" "${launch[@]}" -m scalefl train "${arguments[@]}"
}

# One process, which submits the clients' jobs, merges what they answer, and evaluates.
train_by_jobs() {
    arguments=(--executor jobs --job_launcher slurm "${arguments[@]}")
    if [[ -n "${DRY_RUN:-}" ]]; then
        in_words "$python" -m scalefl train "${arguments[@]}"
        exec "$python" -m scalefl train "${arguments[@]}" --dry_run
    fi
    if on_cpu; then export CUDA_VISIBLE_DEVICES=""; fi # not --use_gpu 0, which would hold for the clients too
    run "$python" -m scalefl train "${arguments[@]}"
}

on_cpu() { [[ "${CPU:-}" == 1 || -z "${SLURM_GPUS_ON_NODE:-}" ]]; }

# COMMAND ...: to its end, or until the job is requeued. Does not return.
run() {
    local child status=0
    if [[ -n "${DRY_RUN:-}" ]]; then
        in_words "$@"
        exit
    fi
    [[ -n "${SLURM_JOB_ID:-}" ]] || refuse "not in a SLURM job; expected sbatch $0 -- ..., or" \
        "DRY_RUN=1 bash $0 -- ... to see what it would run"
    ((restarts <= MAX_REQUEUES)) || give_up
    (
        trap '' USR1
        exec "$@"
    ) &
    child=$!
    while [[ -z "$asked" ]] && kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    while kill -0 "$child" 2>/dev/null; do
        kill -USR1 "$child" 2>/dev/null || true
        sleep 2
    done
    wait "$child" || status=$?
    ((status)) || exit 0
    [[ -n "$asked" || ! "$(facts)" =~ \ PreemptTime=[0-9] ]] || asked=yes
    [[ -n "$asked" && "$status" != 2 ]] || exit "$status"
    if [[ -z "$terminated" || -n "$at_limit" ]]; then
        ((restarts < MAX_REQUEUES)) || give_up
    fi
    [[ -n "$terminated" ]] || requeue
    exit "$UNFINISHED"
}

# Whoever ends the whole job sends TERM, and soon KILL. At the time limit the job can be requeued between the
# two; where SLURM requeues it by itself, nothing is to be done; what was cancelled stays cancelled.
on_terminate() {
    asked=yes terminated=yes
    if [[ " $(facts) " == *" Reason=TimeLimit "* ]]; then
        at_limit=yes
        if ((restarts < MAX_REQUEUES)); then requeue; fi
    fi
}

facts() { scontrol -o show job "${SLURM_JOB_ID:-}" 2>/dev/null || true; }

requeue() {
    if scontrol requeue "$SLURM_JOB_ID"; then
        say "job $SLURM_JOB_ID goes back to the queue (requeue $((restarts + 1)) of at most $MAX_REQUEUES)"
    else
        say "job $SLURM_JOB_ID cannot be requeued; the run can go on: submit it again as you did"
    fi
}

give_up() {
    say "job $SLURM_JOB_ID was requeued $restarts time(s), MAX_REQUEUES is $MAX_REQUEUES; the run is not" \
        "finished: submit it again as you did, with a longer --time or more requeues"
    exit "$UNFINISHED"
}

in_words() {
    local word line=""
    for word; do
        [[ "$word" =~ ^[A-Za-z0-9_./=:,+-]+$ ]] || word="${word@Q}"
        line+="$word "
    done
    echo "${line% }"
}
