"""A teacher of any shape says beside the student what it says by itself: its checkpoint, on every layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.teachers.real import assert_rows, logits_by_row, micro_batches, rollouts, save_teacher

OTHER_SHAPE = {
    "num_layers": 8,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 80,
    "rotary_base": 5000,
    "rotary_percent": 0.5,
    "norm_epsilon": 1e-3,
    "qk_layernorm": True,
}
SHAPES = {
    "deeper and wider, tied, padded to 128": OTHER_SHAPE | {"make_vocab_size_divisible_by": 128},
    "layers that four stages share with embedding and loss among them": OTHER_SHAPE | {"num_layers": 6},
    "untied, other norm and activation": {
        "untie_embeddings_and_output_weights": True,
        "normalization": "LayerNorm",
        "swiglu": None,
        "disable_bias_linear": None,
        "add_qkv_bias": True,
        "position_embedding_type": "learned_absolute",
    },
    "experts": {"num_experts": 4, "moe_router_topk": 2, "moe_layer_freq": "[0,1,0,1]"},
    "attention and MLP layers of a HybridModel": {
        "num_layers": None,
        "hybrid_layer_pattern": "*-*-",
        "hidden_size": 48,
    },
}
"""The student is `tests.tiny.TINY`, tied, padded to what TP needs."""
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
LAYOUTS = [
    pytest.param(1, {}, id="one rank"),
    pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP 2"),
    pytest.param(2, {"pipeline_model_parallel_size": 2}, id="PP 2"),
    pytest.param(2, INTERLEAVED, id="PP 2 interleaved"),
    pytest.param(2, {"tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": 128}, id="TP 2, padded to 256"),
]


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """Folder of each teacher, and what it says of the plain and the hinted prompts by itself."""
    folder = tmp_path_factory.mktemp("teachers")
    found = {}
    for number, (name, flags) in enumerate(SHAPES.items()):
        (said,) = rank_pool(1, init=False).run(save_teacher, str(folder / str(number)), flags, name)
        found[name] = str(folder / str(number)), said
    return found


def annotate(overrides: dict[str, Any], folders: list[str]) -> list[Any]:
    """What each teacher says of plain and hinted prompts, on this layout."""
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_args
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from tests.tiny import megatron, start

    answers = []
    with megatron(**overrides) as args:
        start(args, ddp=True)
        parallel = parallel_context()
        for folder in folders:
            teacher = FrozenTeacher.load(folder, load_megatron_args(folder), parallel)
            assert not any(p.requires_grad for chunk in teacher.model for p in chunk.parameters())
            said = []
            for batch in (rollouts(), rollouts(hinted=True)):
                batches = micro_batches(batch, parallel, args)
                said.append(logits_by_row(batches, teacher.annotate(batches), parallel.tp))
            answers.append(None if said[0] is None else said[0] + said[1])
    return answers


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_a_teacher_of_another_shape_says_what_it_says_by_itself_hints_included(rank_pool, saved, size, layout):
    folders = [folder for folder, _ in saved.values()]
    ranks = rank_pool(size, init=False).run(annotate, layout, folders)
    for number, (_, expected) in enumerate(saved.values()):
        assert_rows([rank[number] for rank in ranks], expected)


def test_a_hint_changes_what_the_teacher_says_of_those_rows_only(saved):
    for _, said in saved.values():
        plain, hinted = said[:4], said[4:]
        for row in range(4):
            assert ((plain[row] - hinted[row]).abs().max() > 0.1) == (row % 2 == 1)


def annotate_by_task(overrides: dict[str, Any], maths: str, code: str) -> Any:
    """What two teachers of a task each say where the second has one sequence in one micro-batch."""
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_args
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.teachers.build import build_teacher
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from megatron_hybrid.teachers.spec import parse_teachers
    from tests.tiny import megatron, start

    with megatron(**overrides) as args:
        start(args, ddp=True)
        parallel = parallel_context()
        teacher = build_teacher(
            parse_teachers(f"code={code},*={maths}"),
            lambda folder: FrozenTeacher.load(folder, load_megatron_args(folder), parallel),
            vocab_size=61,
            temperature=1.0,
            tp=parallel.tp,
        )
        batches = micro_batches(rollouts(tasks=("maths", "maths", "code", "chess")), parallel, args)
        return logits_by_row(batches, teacher.annotate(batches), parallel.tp)


@pytest.mark.parametrize("layout", [INTERLEAVED, {"tensor_model_parallel_size": 2}], ids=["PP 2 interleaved", "TP 2"])
def test_teachers_of_different_width_answer_their_own_tasks(rank_pool, saved, layout):
    (maths, of_maths), (code, of_code), *_ = saved.values()
    ranks = rank_pool(2, init=False).run(annotate_by_task, layout, maths, code)
    assert_rows(ranks, [of_maths[0], of_maths[1], of_code[2], of_maths[3]])
