# shellcheck shell=bash
# What a site has to know of itself, and what every job here does: `launch`. Sourced by the .sbatch files.
# Everything can also be set from outside: RANKS_PER_NODE=4 sbatch slurm/multi_node.sbatch ...

# Python of the environment; all nodes must see it under this path. For modules or conda put their lines above it.
PYTHON="${PYTHON:-.venv/bin/python}"
# Ranks of a node: one for each GPU.
RANKS_PER_NODE="${RANKS_PER_NODE:-8}"
# The network card that nodes reach each other by, where they have several: "ib0", "bond0"; empty: the libraries choose.
NETWORK_INTERFACE="${NETWORK_INTERFACE:-}"
# Where the nodes' agents meet: an address of the first node that the others can resolve, and a free port.
RENDEZVOUS_HOST="${RENDEZVOUS_HOST:-}" # empty: the first node's name
RENDEZVOUS_PORT="${RENDEZVOUS_PORT:-29400}"
# Seconds that ranks have to finish their step and save once a job is to stop. Not more than the scripts' --signal says,
# and than the GraceTime of your partition if jobs are preempted.
GRACE_S="${GRACE_S:-270}"
# Restarts of all ranks from the last checkpoint when one of them has died, before the job is given up.
MAX_RESTARTS="${MAX_RESTARTS:-3}"
# Attempts in a row without a new checkpoint after which a job that is stopped is given up, not queued again.
MAX_STALLED="${MAX_STALLED:-3}"
# The run's folder, on a file system that all nodes share. The same folder again continues the run.
RUN_DIR="${RUN_DIR:-runs/$SLURM_JOB_NAME}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-1} > RANKS_PER_NODE ? SLURM_CPUS_ON_NODE / RANKS_PER_NODE : 1))}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else ranks that are restarted meet the addresses of those before them
if [[ -n "$NETWORK_INTERFACE" ]]; then
    export NCCL_SOCKET_IFNAME="$NETWORK_INTERFACE" GLOO_SOCKET_IFNAME="$NETWORK_INTERFACE"
fi

# train FLAGS...: an online run in RUN_DIR that goes on from its last checkpoint. Flags behind ours win.
train() {
    launch -m megatron_hybrid.cli.train --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints" \
        --hybrid-run-dir "$RUN_DIR" --exit-signal-handler "$@"
}

# launch PROGRAM FLAGS...: a Python program on every rank of the job. A job that is asked to stop, because its time is
# over, it is preempted or somebody types `scancel --signal=TERM`, goes back into the queue once its ranks have ended,
# unless attempts that saved nothing (the save fails, or takes longer than GRACE_S) say that it would do so for ever.
launch() {
    local nodes attempt="$RUN_DIR/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" status=0
    nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    mkdir -p "$attempt"
    last_checkpoint "$@" > "$attempt/started_from"
    printf '%s  attempt %s on %s, logs in %s\n' "$(date '+%F %T')" "${SLURM_RESTART_COUNT:-0}" "$SLURM_JOB_NODELIST" "$attempt"
    # A node that has ended must not end the others, which may still be saving.
    srun --ntasks-per-node 1 --kill-on-bad-exit=0 --wait "$GRACE_S" --output "$attempt/node-%n.log" \
        "$PYTHON" slurm/node.py --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$RANKS_PER_NODE" \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
        --rdzv-endpoint "${RENDEZVOUS_HOST:-${nodes%%$'\n'*}}:$RENDEZVOUS_PORT" \
        --max-restarts "$MAX_RESTARTS" --shutdown-timeout "$GRACE_S" "$@" || status=$?
    printf '%s  ended with status %s\n' "$(date '+%F %T')" "$status"
    case "$status" in
    75) # asked to stop
        if stalled "$@"; then
            printf 'given up: %s attempts in a row have left no new checkpoint. Does a save end within GRACE_S=%s s?\n' "$MAX_STALLED" "$GRACE_S"
            exit "$status"
        fi
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    143) scontrol requeue "$SLURM_JOB_ID" ;; # asked so early that no rank had started
    *) exit "$status" ;;
    esac
}

# Whether the attempt MAX_STALLED - 1 before this one has started from the checkpoint that is still the last.
stalled() {
    local now first="$RUN_DIR/logs/$SLURM_JOB_ID.$((${SLURM_RESTART_COUNT:-0} - MAX_STALLED + 1))/started_from"
    now="$(last_checkpoint "$@")"
    [[ "$now" != unknown && -e "$first" && "$now" == "$(< "$first")" ]]
}

# last_checkpoint FLAGS...: what is in the folder of the last --save among them; "unknown" for a program without one.
last_checkpoint() {
    local save="" before="" word
    for word in "$@"; do
        if [[ "$before" == --save ]]; then save="$word"; elif [[ "$word" == --save=* ]]; then save="${word#--save=}"; fi
        before="$word"
    done
    if [[ -z "$save" ]]; then echo unknown; else cat "$save/latest_checkpointed_iteration.txt" 2> /dev/null || echo none; fi
}
