"""Converted checkpoints in real `megatron.training`, cut over tensor and pipeline ranks."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_hybrid.checkpoint.compare import TOLERANCE, compare_logits
from megatron_hybrid.checkpoint.folders import hf_folder_to_megatron, megatron_folder_to_hf
from megatron_hybrid.runtime import cpu
from tests.checkpoint.tiny_llama import RELATIVES, VOCAB, make_folder

FLAGS = (
    "--use-checkpoint-args --finetune --seq-length 16 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 "
    # A step of length 0 leaves AdamW's weights as they are, bit for bit.
    "--lr 0 --min-lr 0 --weight-decay 0 --save-interval 1 --eval-iters 0 --eval-interval 1000 "
    "--dataloader-type external --num-workers 0 --distributed-backend gloo --transformer-impl local "
    "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion "
    "--no-bias-swiglu-fusion --calculate-per-token-loss"
)


class Batches:
    """The same sequence for ever."""

    def __iter__(self):
        return self

    def __next__(self):
        tokens = torch.arange(16)[None] % 60
        return {"tokens": tokens, "labels": tokens + 1, "position_ids": torch.arange(16)[None]}


def datasets(num_samples, vp_stage=None):
    return Batches(), None, None


datasets.is_distributed = True


def train_one_idle_step(load, save, flags):
    """Real Megatron on this rank: load, one step with learning rate 0, save. Returns the loss where it is known."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    losses = []

    def loss_func(output):
        losses.append(output.float().mean().item())
        count = torch.tensor(output.numel(), dtype=torch.int)
        return output.float().sum(), count, {"lm loss": torch.stack([output.float().sum().detach(), count.float()])}

    def forward_step(iterator, model):
        batch = next(iterator)
        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), loss_func

    with cpu.enabled():
        sys.argv = ["train.py", "--load", load, "--save", save, *FLAGS.split(), *flags.split()]
        args = parse_and_validate_args()
        pretrain(
            pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
            datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    return losses


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    model = make_folder(folder / "hf")
    hf_folder_to_megatron(folder / "hf", folder / "megatron")
    return folder / "megatron", loss_of(model)


def loss_of(model):
    """transformers' loss of the sequence that Megatron is given."""
    tokens = torch.arange(16)[None] % 60
    with torch.no_grad():
        # Megatron's own loss runs over the padding columns too, whose logits are exactly 0.
        logits = torch.nn.functional.pad(model(tokens).logits, (0, 128 - VOCAB))
    return torch.nn.functional.cross_entropy(logits[0], tokens[0] + 1).item()


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        "--pipeline-model-parallel-size 2 --bf16",
    ],
)
def test_megatron_loads_the_checkpoint_at_any_layout(checkpoint, tmp_path, rank_pool, flags):
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state

    folder, expected_loss = checkpoint
    tokens = torch.arange(16)[None] % 60
    results = rank_pool(2, init=False).run(train_one_idle_step, str(folder), str(tmp_path / "again"), flags)

    before, args_before = load_megatron_state(folder)
    after, args_after = load_megatron_state(tmp_path / "again")
    dtype = torch.bfloat16 if "bf16" in flags else torch.float32
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(dtype), after[name]) for name in before)
    for name in ("num_layers", "padded_vocab_size", "rotary_base", "tokenizer_model", "num_query_groups"):
        assert args_before[name] == args_after[name], name

    # What was trained goes back to Hugging Face, though Megatron's training does not store the vocabulary's true size.
    assert args_after["vocab_size"] is None
    megatron_folder_to_hf(tmp_path / "again", tmp_path / "back")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert exported.config.vocab_size == VOCAB
    assert compare_logits(tmp_path / "back", tmp_path / "again", text="w3 w4 w5") < TOLERANCE
    if dtype == torch.float32:
        original = AutoModelForCausalLM.from_pretrained(folder.with_name("hf"))
        with torch.no_grad():
            assert torch.equal(exported(tokens).logits, original(tokens).logits)
        losses = [loss for ranks in results for loss in ranks]
        # fp32 sums in another order, as for the logits of one rank.
        assert losses and losses == pytest.approx([expected_loss] * len(losses), rel=1e-5)


@pytest.mark.parametrize(("relative", "switch"), [("qwen2", "--add-qkv-bias"), ("qwen3", "--qk-layernorm")])
def test_biases_and_norms_of_heads_are_cut_over_tensor_ranks(tmp_path, rank_pool, relative, switch):
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state

    model = make_folder(tmp_path / "hf", num_layers=2, **RELATIVES[relative])
    hf_folder_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    flags = f"--tensor-model-parallel-size 2 {switch}"
    results = rank_pool(2, init=False).run(
        train_one_idle_step, str(tmp_path / "megatron"), str(tmp_path / "again"), flags
    )
    before, _ = load_megatron_state(tmp_path / "megatron")
    after, _ = load_megatron_state(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    losses = [loss for ranks in results for loss in ranks]
    assert losses and losses == pytest.approx([loss_of(model)] * len(losses), rel=1e-5)  # as above
