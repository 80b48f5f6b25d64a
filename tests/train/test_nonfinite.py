"""One rank has a gradient that is not finite: all skip the step, nothing moves, its batch is kept, N end the run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.online_jobs import run, steps, with_teacher

LAYOUTS = [
    pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP 2"),
    pytest.param(2, {"pipeline_model_parallel_size": 2}, id="PP 2"),
    pytest.param(2, {"use_distributed_optimizer": True}, id="DP 2, distributed optimizer"),
    pytest.param(
        2,
        {"use_distributed_optimizer": True, "bf16": True},
        id="DP 2, distributed optimizer, bf16",
        marks=pytest.mark.slow,
    ),
]
POISONED = "decoder.layers.3.mlp.linear_fc2.weight"
"""Of the last of four layers, cut over tensor-parallel ranks; the second of two pipeline stages calls it layer 1."""


def state_of(model: list[Any], optimizer: Any) -> str:
    """A hash of this rank's weights, moments and step counts."""
    digest = hashlib.sha256()
    for chunk in model:
        for parameter in chunk.parameters():
            digest.update(parameter.detach().float().numpy().tobytes())
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            digest.update(str(group.get("step")).encode())
            for parameter in group["params"]:
                for name, value in sorted(part.optimizer.state[parameter].items()):
                    digest.update(name.encode() + torch.as_tensor(value).float().numpy().tobytes())
    return digest.hexdigest()


def watched(train_step: Callable[..., Any], states: list[str], during: Callable[..., Any]) -> Callable[..., Any]:
    """`train_step` with the state after it written down, inside `during(model, optimizer, step)`."""

    @functools.wraps(train_step)
    def step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        *args: Any,
        iteration: int,
        **kwargs: Any,
    ) -> Any:
        if not states:
            states.append(state_of(model, optimizer))
        with during(model, optimizer, iteration + 1):
            result = train_step(
                forward_step_func, data_iterator, model, optimizer, *args, iteration=iteration, **kwargs
            )
        states.append(state_of(model, optimizer))
        return result

    return step


class Poison:
    """On one rank the gradient of one parameter is `value`, in some steps."""

    def __init__(self, rank: int, value: float, of_steps: list[int]) -> None:
        self.rank, self.value, self.of_steps = rank, value, of_steps

    def __call__(self, model: Any, optimizer: Any, step: int) -> Any:
        import torch.distributed as dist

        stack = contextlib.ExitStack()
        if step in self.of_steps and dist.get_rank() == self.rank:
            kind = POISONED.partition(".3.")[2]
            *_, parameter = (p for chunk in model for name, p in chunk.named_parameters() if name.endswith(kind))
            handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, self.value))
            stack.callback(handle.remove)
        return stack


class NotTaken:
    """The optimizer says that it has skipped, as for an overflow of the loss scaler, in some steps."""

    def __init__(self, of_steps: list[int]) -> None:
        self.of_steps = of_steps

    def __call__(self, model: Any, optimizer: Any, step: int) -> Any:
        skips = mock.patch.object(optimizer, "step", lambda: (False, None, None))
        return skips if step in self.of_steps else contextlib.nullcontext()


def watched_run(folder: str, overrides: dict[str, Any], during: Any) -> tuple[list[str], str]:
    """States at the start and after each step, and what ended the run, of this rank."""
    from megatron.training import training

    from megatron_hybrid.errors import DivergedError

    states: list[str] = []
    with mock.patch.object(training, "train_step", watched(training.train_step, states, during)):
        try:
            run(folder, overrides)
        except DivergedError as error:
            return states, str(error)
    return states, ""


def kept(folder: Path, name: str, step: int) -> list[Path]:
    return sorted((folder / name / "nonfinite" / f"step_{step:07d}").glob("*.json"))


@pytest.mark.parametrize(("size", "overrides"), LAYOUTS)
def test_a_gradient_that_one_rank_has_is_skipped_by_all_and_the_run_goes_on_as_if_it_had_not_been(
    rank_pool, folder, size, overrides
):
    pool = rank_pool(size, init=False)
    flags = {"train_iters": 4, "clip_grad": 1.0} | overrides
    poison = Poison(size - 1, float("inf"), [2])
    (folder / "poisoned" / "nonfinite" / "step_0000002").mkdir(parents=True, exist_ok=True)
    (folder / "poisoned" / "nonfinite" / "step_0000002" / "rank_9.json").touch()  # of a run before
    got = pool.run(watched_run, str(folder), with_teacher(folder, "poisoned", **flags), poison)
    for states, ended in got:
        assert ended == ""
        assert states[2] == states[1], "weights, moments and counts are as before the skipped step"
        assert len(set(states)) == 4, "all others are taken"
    expected = pool.run(watched_run, str(folder), with_teacher(folder, "not_taken", **flags), NotTaken([2]))
    assert got == expected
    poisoned, not_taken = steps(folder, "poisoned"), steps(folder, "not_taken")
    assert [step["training/skipped_steps"] for step in poisoned] == [0, 1, 0, 0]
    assert [poisoned[i] for i in (0, 2, 3)] == [not_taken[i] for i in (0, 2, 3)]

    replicas = 1 if "pipeline_model_parallel_size" in overrides or "tensor_model_parallel_size" in overrides else 2
    files = kept(folder, "poisoned", 2)
    assert len(files) == replicas
    about = json.loads(files[-1].read_text())
    assert about["parameters"] == [POISONED]
    assert (about["step"], about["gradient_norm"]) == (2, "Infinity")


def test_the_kept_batch_is_what_the_step_learnt_from(rank_pool, folder):
    from safetensors.torch import load_file

    pool = rank_pool(1, init=False)
    flags = with_teacher(folder, "batch", train_iters=2, hybrid_samples_interval=1, micro_batch_size=16)
    pool.run(watched_run, str(folder), flags, Poison(0, float("nan"), [2]))
    (file,) = kept(folder, "batch", 2)
    about, tensors = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
    assert about["extremes"]["KL"][0] >= 0
    assert about["gradient_norm"] == "NaN"
    samples = [json.loads(line) for line in (folder / "batch" / "samples.jsonl").read_text().splitlines()]
    shown = [sample for sample in samples if sample["step"] == 2]
    for row, (sample, sequence) in enumerate(zip(shown, about["sequences"], strict=False)):
        assert (sequence["prompt"], sequence["response"]) == (sample["prompt"], sample["response"])
        assert tensors["rewards"][row] == sample["reward"]
        kl = tensors["token/kl"][tensors["row_of_token"] == row]
        assert kl.tolist() == pytest.approx(sample["kl_per_token"], rel=1e-4)  # written with 5 digits
        mask = tensors["response_mask"][row]
        assert (
            mask.nonzero().squeeze(1).tolist() == tensors["position_of_token"][tensors["row_of_token"] == row].tolist()
        )
    assert len(shown) >= 16 and len(about["sequences"]) == 32


def test_some_in_a_row_end_every_rank_with_one_report(rank_pool, folder):
    flags = with_teacher(folder, "ended", train_iters=6, hybrid_nonfinite_steps=2)
    # One, a good one, then two.
    got = rank_pool(2, init=False).run(watched_run, str(folder), flags, Poison(1, float("nan"), [1, 3, 4]))
    (states, text), (_, others) = got
    assert text == others
    assert len(states) == 1 + 4
    assert states[1] == states[0] and states[2] != states[1] and states[4] == states[3] == states[2]
    assert "not finite in 2 steps in a row" in text and "those after step 2." in text
    for step in (3, 4):
        assert f"step {step}, gradient norm nan, in {POISONED}; reward 0 to " in text
    assert f"{folder}/ended/nonfinite" in text
    assert [len(kept(folder, "ended", step)) for step in range(1, 5)] == [2, 0, 2, 2]
    assert [step["training/skipped_steps"] for step in steps(folder, "ended")] == [1, 0, 1, 1]


def test_those_before_a_restart_count(rank_pool, folder):
    """Else a run that diverges would go on for ever under a launcher that starts it again every few steps."""
    kept_in = {name: f"{folder}/restarted-checkpoints" for name in ("save", "load")}
    flags = with_teacher(folder, "restarted", train_iters=6, hybrid_nonfinite_steps=3, save_interval=100, **kept_in)
    pool = rank_pool(2, init=False)
    got = pool.run(watched_run, str(folder), flags | {"exit_interval": 3}, Poison(1, float("nan"), [2, 3]))
    assert [text for _, text in got] == ["", ""]
    (_, text), (_, other) = pool.run(watched_run, str(folder), flags, Poison(1, float("nan"), [4]))
    assert text == other
    assert "not finite in 3 steps in a row" in text and "those after step 1." in text
    for step in (2, 3, 4):
        assert f"step {step}, gradient norm nan, in {POISONED}; reward 0 to " in text


def test_without_the_guard_megatrons_own_check_ends_the_run(rank_pool, folder):
    flags = with_teacher(folder, "unguarded", train_iters=2, hybrid_nonfinite_steps=0, rerun_mode="disabled")
    with pytest.raises(RuntimeError, match="found NaN in local grad norm for bucket #0"):
        rank_pool(1, init=False).run(watched_run, str(folder), flags, Poison(0, float("nan"), [1]))


def forbidding_run(folder: str, overrides: dict[str, Any], token_id: int) -> str:
    """A run whose teacher gives no probability to one token at the first response token of each micro-batch.

    Returns what this rank warned of.
    """
    import io
    import logging

    from megatron_hybrid.records import HiddenPayload

    def logits(self: HiddenPayload, rows: slice = slice(None)) -> torch.Tensor:
        from megatron.core import parallel_state

        found = self.logits_of(self.hidden[rows]).clone()
        local = token_id - parallel_state.get_tensor_model_parallel_rank() * found.shape[-1]
        if not rows.start and 0 <= local < found.shape[-1] and len(found):
            found[0, local] = -torch.inf
        return found

    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("megatron_hybrid.train.infinite_kl").addHandler(handler)
    try:
        with mock.patch.object(HiddenPayload, "logits", logits), contextlib.redirect_stderr(io.StringIO()):
            run(folder, overrides)
    finally:
        logging.getLogger("megatron_hybrid.train.infinite_kl").removeHandler(handler)
    return said.getvalue()


@pytest.mark.parametrize(("size", "overrides"), [LAYOUTS[0], pytest.param(2, {}, id="DP 2")])
def test_an_infinite_kl_is_named_by_token_and_position(rank_pool, folder, size, overrides):
    from tests.online_jobs import WORDS

    flags = with_teacher(folder, "infinite", train_iters=2) | overrides
    said = rank_pool(size, init=False).run(forbidding_run, str(folder), flags, 5)
    assert said[0] == "", "one rank says it"
    assert said[-1].count("the divergence from the teacher is infinite at 4 response tokens of step 1") == 1
    assert "--hybrid-teacher-logit-floor" in said[-1]
    records = [json.loads(line) for line in (folder / "infinite" / "infinite_kl.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1] * 4 + [2] * 4  # the first of each of four micro-batches
    for record in records:
        assert record["forbidden"] == {"count": 1, "first": [{"token_id": 5, "token": WORDS[3]}]}
        assert (record["response_token"], record["position"]) == (1, 1)
        assert record["token"] == (["", "<unk>", *WORDS][record["token_id"]])
    assert f"'{WORDS[3]}'" in said[-1] and f"of prompt {records[0]['prompt_id']} (task prompts)" in said[-1]
    assert [step["training/infinite_kl_tokens"] for step in steps(folder, "infinite")] == [4, 4]
    floored = flags | {"hybrid_teacher_logit_floor": -50, "hybrid_run_dir": f"{folder}/floored"}
    assert rank_pool(size, init=False).run(forbidding_run, str(folder), floored, 5)[-1] == ""
