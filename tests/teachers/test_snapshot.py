"""A copy of the student is fixed, renewed or averaged, on every layout, and goes on exactly after a restart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DECAY = 0.9
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
LAYOUTS = [
    pytest.param(1, {"bf16": True}, id="one rank, bf16"),
    pytest.param(2, {"tensor_model_parallel_size": 2, "untie_embeddings_and_output_weights": True}, id="TP 2, untied"),
    pytest.param(2, INTERLEAVED, id="PP 2 interleaved"),
    pytest.param(2, {"use_distributed_optimizer": True, "bf16": True}, id="DP 2, bf16, distributed optimizer"),
]


def tensors(model: Any) -> dict[str, Tensor]:
    from megatron_hybrid.mcore.second_model import named_tensors

    return {name: tensor.clone() for name, tensor in named_tensors(model)}


def take_steps(model: Any, teachers: list[Any], first: int, last: int) -> list[dict[str, Tensor]]:
    """Optimizer steps that put known weights in place; returns the student's after each."""
    from tests.tiny import set_weights

    seen = []
    for step in range(first, last + 1):
        set_weights(model, f"after step {step}")
        for teacher in teachers:
            teacher.update(step)
        seen.append(tensors(model))
    return seen


def averaged(history: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The average in float64, of the weights as the student stores them."""
    mean = {name: value.double() for name, value in history[0].items()}
    for weights in history[1:]:
        mean = {name: DECAY * value + (1 - DECAY) * weights[name].double() for name, value in mean.items()}
    return mean


def assert_averaged(model: Any, history: list[dict[str, Tensor]]) -> None:
    for name, value in tensors(model).items():
        expected = averaged(history)[name].to(value.dtype)
        if "word_embeddings" in name:  # its padding is not saved where it lies beyond the saved vocabulary
            value, expected = value[:30], expected[:30]
        # fp32: some ten roundings of three steps. bf16: where fp32's error crosses a tie, the last bit falls elsewhere.
        rtol = 1e-6 if value.dtype == torch.float32 else 2**-7
        # 1e-7: an ulp of the weights averaged, of size 1 and less, for averages that nearly cancel.
        torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-7)


def follow(overrides: dict[str, Any], folder: str) -> None:
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from megatron_hybrid.teachers.snapshot import SnapshotTeacher
    from tests.teachers.real import logits_by_row, micro_batches, rollouts
    from tests.tiny import megatron, set_weights, start

    with megatron(**overrides) as args:
        model = start(args, ddp=True)
        parallel = parallel_context()
        set_weights(model, "before")
        history = [tensors(model)]
        fixed, renewed = SnapshotTeacher(model, parallel), SnapshotTeacher(model, parallel, refresh_interval=2)
        average = SnapshotTeacher(model, parallel, decay=DECAY)
        history += take_steps(model, [fixed, renewed, average], 1, 2)

        batches = micro_batches(rollouts(), parallel, args)
        ours, students = (
            logits_by_row(batches, teacher.annotate(batches), parallel.tp)
            for teacher in (renewed, FrozenTeacher(model, parallel))
        )
        assert (ours is None) == (students is None)
        for own, students_own in zip(ours or [], students or [], strict=True):
            assert torch.equal(own, students_own), "a copy just taken says what the student says"

        history += take_steps(model, [fixed, renewed, average], 3, 3)
        for name, value in tensors(fixed.model).items():
            assert torch.equal(value, history[0][name]), name
        for name, value in tensors(renewed.model).items():
            assert torch.equal(value, history[2][name]), name
        assert_averaged(average.model, history)
        assert not any(p.requires_grad or hasattr(p, "main_grad") for c in average.model for p in c.parameters())
        assert all(p.requires_grad for chunk in model for p in chunk.parameters())

        before = tensors(average.model)
        average.save(folder)
        assert all(torch.equal(value, before[name]) for name, value in tensors(average.model).items())
        resumed = SnapshotTeacher(model, parallel, decay=DECAY)
        resumed.load(folder)
        take_steps(model, [average, resumed], 4, 6)
        for name, value in tensors(average.model).items():
            assert torch.equal(value, tensors(resumed.model)[name]), f"{name} after a restart"


def load_elsewhere(overrides: dict[str, Any], folder: str) -> None:
    """The average of steps 1 to 3, saved on another layout, as a copy and as a teacher of its own."""
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_args
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from megatron_hybrid.teachers.snapshot import SnapshotTeacher
    from tests.tiny import megatron, set_weights, start

    with megatron(**overrides) as args:
        model = start(args, ddp=True)
        set_weights(model, "before")
        history = [tensors(model), *take_steps(model, [], 1, 3)]
        copy = SnapshotTeacher(model, parallel_context(), decay=DECAY)
        copy.load(folder)
        teacher = FrozenTeacher.load(folder, load_megatron_args(folder), parallel_context())
        assert_averaged(copy.model, history)
        assert_averaged(teacher.model, history)


@pytest.fixture(scope="module")
def followed(rank_pool, tmp_path_factory):
    """Folder of the average that each layout saved."""
    folder = tmp_path_factory.mktemp("copies")
    done: dict[str, str] = {}

    def follow_once(size: int, layout: dict[str, Any]) -> str:
        key = repr((size, layout))
        if key not in done:
            rank_pool(size, init=False).run(follow, layout, str(folder / str(len(done))))
            done[key] = str(folder / str(len(done)))
        return done[key]

    return follow_once


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_copies_are_fixed_renewed_or_averaged_and_survive_a_restart(followed, size, layout):
    followed(size, layout)


def test_a_copy_saved_on_one_layout_loads_on_another(followed, rank_pool):
    folder = followed(2, INTERLEAVED)
    rank_pool(2, init=False).run(load_elsewhere, {"tensor_model_parallel_size": 2}, folder)


def average_of_bf16(decay: float, steps: int) -> None:
    """Weights go from one value to another and stay: the average must arrive."""
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.teachers.snapshot import SnapshotTeacher
    from tests.tiny import megatron, start

    with megatron(bf16=True) as args:
        model = start(args, ddp=True)
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.fill_(1.0)
            teacher = SnapshotTeacher(model, parallel_context(), decay=decay)
            for parameter in model[0].parameters():
                parameter.fill_(1.5)
        for step in range(1, steps + 1):
            teacher.update(step)
        expected = torch.tensor(1.5 - 0.5 * decay**steps).bfloat16()
        assert all((value == expected).all() for value in tensors(teacher.model).values())


def test_a_slow_average_of_bf16_weights_does_not_stand_still(rank_pool):
    # A step moves it by 5e-4, an eighth of the last bit of bf16 near 1.
    rank_pool(1, init=False).run(average_of_bf16, 0.999, 100)


BIASED = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_input_jitter_eps": 0.1,
    "bf16": True,
}


def copy_of_routers() -> None:
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.mcore.second_model import named_tensors
    from megatron_hybrid.teachers.snapshot import SnapshotTeacher
    from tests.teachers.real import logits_by_row, micro_batches, rollouts
    from tests.tiny import megatron, set_weights, start

    with megatron(**BIASED) as args:
        model = start(args, ddp=True)
        set_weights(model)
        biases = [tensor for name, tensor in named_tensors(model) if name.endswith("expert_bias")]
        for bias in biases:
            bias.data = torch.tensor([1.0, 1.001, -0.3, 1 / 3])  # fp32, as a router keeps it once it has run
        assert len(biases) == 4
        teacher = SnapshotTeacher(model, parallel_context())
        copied = [tensor for name, tensor in named_tensors(teacher.model) if name.endswith("expert_bias")]
        assert all(torch.equal(copy, bias) for copy, bias in zip(copied, biases, strict=True))

        batches = micro_batches(rollouts(), parallel_context(), args)
        first, second = (logits_by_row(batches, teacher.annotate(batches), parallel_context().tp) for _ in range(2))
        for once, again in zip(first or [], second or [], strict=True):
            assert torch.equal(once, again), "the jitter of training is no part of a teacher"


def test_a_copy_routes_by_the_students_biases_in_fp32_and_without_its_jitter(rank_pool):
    rank_pool(1, init=False).run(copy_of_routers)


def overlapped() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A real step of the distributed optimizer, whose gather of weights waits for the next forward pass."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.teachers.snapshot import SnapshotTeacher
    from tests.tiny import megatron, set_weights, start

    flags = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "bf16": True}
    with megatron(**flags, lr=0.1) as args:
        model = start(args, ddp=True)
        set_weights(model, "before")
        optimizer = get_megatron_optimizer(get_megatron_optimizer_config(args)[0], model)
        optimizer.reload_model_params()
        teacher = SnapshotTeacher(model, parallel_context(), refresh_interval=1)
        for parameter in model[0].parameters():
            parameter.main_grad.fill_(1.0)
        optimizer.step()
        stepped = tensors(model)
        teacher.update(1)
        return stepped, tensors(model), tensors(teacher.model)


def test_a_copy_waits_for_weights_that_are_still_under_way(rank_pool):
    (first, settled, copy), (second, _, other_copy) = rank_pool(2, init=False).run(overlapped)
    assert any(not torch.equal(value, second[name]) for name, value in first.items()), "nothing was under way"
    for name, value in settled.items():
        assert torch.equal(copy[name], value) and torch.equal(other_copy[name], value), name
