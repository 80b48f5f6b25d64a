#!/usr/bin/env bash
# From a text corpus to a trained student, nothing taken from anywhere: tokenizer, data, teacher, hybrid training.
#
#     examples/5_from_a_text_corpus.sh
#     PRETRAIN_ITERS=50 examples/5_from_a_text_corpus.sh --train-iters 20
#
#   1  arithmetic_corpus.py        a corpus of sums and differences, one answer in four wrong; questions as .jsonl
#   2  tools/train_tokenizer.py    a sentencepiece tokenizer of the corpus
#   3  tools/preprocess_data.py    the corpus as Megatron's indexed dataset
#   4  pretrain_gpt.py             a teacher of three layers, Megatron's own pretraining
#   5  tools/prune_checkpoint.py   a student: the teacher without its middle layer, which answers badly
#   6  pretrain_gpt.py --hybrid    the student imitates the teacher and is rewarded for right answers
#
# The tokenizer has no chat template: a prompt is the question and a line break, as in the corpus. The teacher knows
# right and wrong answers as the corpus has them, the reward tells them apart: the student ends above the corpus' 75 %.
# Further arguments go to the student's training and win.
#
# Knobs: RUN_DIR (everything that is made; a new folder, or one of an earlier run of this, which is made anew), PRETRAIN_ITERS (steps of the teacher), PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
run="${RUN_DIR:-runs/5_from_a_text_corpus}"
pretrain_iters="${PRETRAIN_ITERS:-300}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore

# Only what this script has made is removed.
marker="$run/made_by_5_from_a_text_corpus"
if [[ ! -e "$marker" && -n "$(ls -A "$run" 2> /dev/null)" ]]; then
    printf '%s holds files that this script has not made, and it removes data, teacher, pruned and student: give RUN_DIR another folder.\n' "$run" >&2
    exit 2
fi
mkdir -p "$run" && touch "$marker"
rm -rf "$run"/{data,teacher,pruned,student}
"$python" examples/arithmetic_corpus.py "$run/data"
"$python" tools/train_tokenizer.py --input "$run/data/corpus.jsonl" --save "$run/data/tokenizer.model" --vocab-size 320
tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$run/data/tokenizer.model")
"$python" tools/preprocess_data.py --input "$run/data/corpus.jsonl" --output-prefix "$run/data/corpus" "${tokenizer[@]}"

shape=(
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --hidden-size 96 --num-attention-heads 4 --attention-dropout 0 --hidden-dropout 0
    --max-position-embeddings 64 --make-vocab-size-divisible-by 64
)
training=(
    --calculate-per-token-loss --weight-decay 0 --clip-grad 1 --init-method-std 0.05
    --log-interval 1000 --ckpt-format torch_dist --no-save-optim --no-save-rng
)
# What a machine without a GPU, Transformer Engine and Apex needs of Megatron.
cpu=(
    --distributed-backend gloo --transformer-impl local --num-workers 0 --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion
)

# Runs pretrain_gpt.py: what it prints goes to the log named first, the lines that match the pattern also to the console.
pretrain() {
    local log="$1" pattern="$2" status=0
    shift 2
    "$python" examples/pretrain_gpt.py "${shape[@]}" "${training[@]}" "${tokenizer[@]}" "${cpu[@]}" "$@" 2>&1 |
        tee "$log" | grep --line-buffered -E "$pattern" || status="${PIPESTATUS[0]}"
    if ((status)); then
        grep -E '^([A-Za-z_.]+\.py: error|error|[A-Za-z_.]*Error):' "$log" | sort -u >&2 || true
        printf 'failed with status %s; the whole story is in %s\n' "$status" "$log" >&2
        exit "$status"
    fi
}

printf 'teacher: %s steps of pretraining; everything Megatron says is in %s\n' "$pretrain_iters" "$run/teacher.log"
pretrain "$run/teacher.log" 'validation loss at iteration' \
    --num-layers 3 --seq-length 64 --data-path "$run/data/corpus" --split 95,5,0 \
    --micro-batch-size 16 --global-batch-size 16 --train-iters "$pretrain_iters" --lr 3e-3 --min-lr 3e-4 \
    --lr-decay-style cosine --eval-iters 4 --eval-interval "$pretrain_iters" \
    --save "$run/teacher" --save-interval "$pretrain_iters"

"$python" tools/prune_checkpoint.py --load "$run/teacher" --save "$run/pruned" --drop 1 2> "$run/pruning.log"

printf 'student: hybrid training; everything Megatron says is in %s\n' "$run/student.log"
pretrain "$run/student.log" '^(step|held-out|before and after|samples after|[0-9]+ figures|[┏┡└├│┃┗┠╇])|jsonl: ' \
    --hybrid --hybrid-prompts "$run/data/prompts.jsonl" --hybrid-eval-prompts "$run/data/held_out.jsonl" \
    --hybrid-teacher-load "$run/teacher" --hybrid-reward-weight 1 --hybrid-imitation-weight 0.2 \
    --hybrid-group-size 8 --hybrid-max-response-length 4 --hybrid-rollout-batch-size 128 --hybrid-run-dir "$run" \
    --load "$run/pruned" --finetune --num-layers 2 --seq-length 32 \
    --micro-batch-size 128 --global-batch-size 128 --train-iters 150 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine \
    --eval-iters 1 --eval-interval 1000 --save "$run/student" --save-interval 1000 "$@"
