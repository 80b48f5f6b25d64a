#!/usr/bin/env bash
# Recovers a pruned SmolLM2-135M on a machine without a GPU: imitation of the unpruned model and reward at once, on-policy.
#
#     examples/6_smollm2_recovery.sh                          8 minutes on 2 cores, after one minute of preparation, once
#     NPROC=2 examples/6_smollm2_recovery.sh --pipeline-model-parallel-size 2
#     NPROC=2 examples/6_smollm2_recovery.sh --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3
#
# Teacher: SmolLM2-135M-Instruct, 30 layers. Student: the same without layers 12-17, of which those tried it misses least.
# Prompts: four reasoning-gym tasks with one worked example each. Further arguments go to Megatron and win.
#
# Weights alone are saved, once, at the end: an interrupted run starts anew.
#
# Knobs: NPROC (ranks), RUN_DIR (what the run leaves), MODELS (converted models, 1.5 GB, made once), PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
ranks="${NPROC:-1}" cores="$(getconf _NPROCESSORS_ONLN)"
run="${RUN_DIR:-runs/smollm2_recovery}"
models="${MODELS:-${MEGATRON_HYBRID_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron_hybrid}/models}"
hf="$models/smollm2-hf" teacher="$models/smollm2" student="$models/smollm2-without-12-17"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 WANDB_MODE="${WANDB_MODE:-offline}" WANDB_SILENT=true PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false

"$python" tools/convert_checkpoint.py smollm2 --save "$hf"
if [[ ! -e "$teacher/latest_checkpointed_iteration.txt" ]]; then
    rm -rf "$teacher"
    "$python" tools/convert_checkpoint.py hf-to-megatron --load "$hf" --save "$teacher"
    "$python" tools/convert_checkpoint.py compare --hf "$hf" --megatron "$teacher"
fi
if [[ ! -e "$student/latest_checkpointed_iteration.txt" ]]; then
    rm -rf "$student"
    "$python" tools/prune_checkpoint.py --load "$teacher" --save "$student" --drop 12-17
fi

model=(
    --load "$student" --finetune --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$hf"
    --num-layers 24 --hidden-size 576 --ffn-hidden-size 1536 --num-attention-heads 9 --kv-channels 64
    --group-query-attention --num-query-groups 3 --swiglu --disable-bias-linear
    --normalization RMSNorm --norm-epsilon 1e-05 --position-embedding-type rope --rotary-base 100000
    --max-position-embeddings 8192 --attention-dropout 0 --hidden-dropout 0
)
hybrid=(
    --hybrid --hybrid-teacher-load "$teacher"
    --hybrid-prompts "reasoning_gym:calendar_arithmetic,count_primes,syllogism,time_intervals" --hybrid-system-prompt ""
    --hybrid-group-size 4 --hybrid-max-response-length 16
    --hybrid-reward-weight 1 --hybrid-imitation-weight 1 --hybrid-discount 0.7
    --hybrid-run-dir "$run"
)
training=(
    --bf16 --seq-length 256 --micro-batch-size 8 --global-batch-size 16 --train-iters 85
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.01 --adam-beta2 0.95 --clip-grad 1
    --eval-iters 4 --eval-interval 1000
    --save "$run/checkpoints" --save-interval 1000 --ckpt-format torch_dist --no-save-optim --no-save-rng
)
logging=(
    --log-interval 1000 --tensorboard-dir "$run/tensorboard" --tensorboard-log-interval 1
    --wandb-project megatron_hybrid --wandb-exp-name smollm2_recovery --wandb-save-dir "$run/wandb"
)
# What a machine without a GPU, Transformer Engine and Apex needs of Megatron.
cpu=(
    --distributed-backend gloo --transformer-impl local --num-workers 0 --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion
)

# Megatron's own output goes to a log; the console keeps what the run reports.
mkdir -p "$run"
log="$run/train.log"
printf 'training, about 8 minutes on 2 cores; everything Megatron says is in %s\n' "$log"
status=0
"$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m megatron_hybrid.cli.train \
    "${model[@]}" "${hybrid[@]}" "${training[@]}" "${logging[@]}" "${cpu[@]}" "$@" 2>&1 |
    tee "$log" | grep --line-buffered -E '^(step|held-out|before and after|samples after|[0-9]+ figures|[┏┡└├│┃┗┠╇])|jsonl: ' || status="${PIPESTATUS[0]}"
if ((status)); then
    grep -E '^([A-Za-z_.]+\.py: error|error|(\[rank[0-9]+\]: )?[A-Za-z_.]*Error):' "$log" | grep -v ChildFailedError |
        sort -u >&2 || true
    printf 'the run failed with status %s; the whole story is in %s\n' "$status" "$log" >&2
fi
exit "$status"
