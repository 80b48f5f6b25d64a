"""Each token is answered by the teacher of its sequence's task, in the student's order of rows."""

import dataclasses

import pytest
import torch

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.records import TopKPayload
from megatron_hybrid.teachers.tasks import TaskPayload, TaskTeachers
from tests.teachers.scripted import Scripted, micro_batch

MIXED = micro_batch(("maths", "code", "maths"), (0, 1, 2, 0, 1, 2, 0, 2))
MATHS = micro_batch(("maths",), (0, 0, 0), first=8)
CODE = micro_batch(("code",), (0, 0), first=11)
BATCHES = [MIXED, MATHS, CODE]


def tables():
    return torch.randn(13, 5), torch.randn(13, 5)


def test_rows_come_from_the_teacher_of_their_task_in_the_order_of_the_student():
    maths, code = tables()
    mixed, of_maths, of_code = TaskTeachers({"maths": Scripted(maths), "code": Scripted(code)}).annotate(BATCHES)
    expected = maths[:8].clone()
    expected[[1, 4]] = code[[1, 4]]
    assert torch.equal(mixed.logits(), expected)
    assert torch.equal(of_maths.logits(), maths[8:11])
    assert torch.equal(of_code.logits(), code[11:13])


@pytest.mark.parametrize("rows", [slice(0, 8), slice(0, 1), slice(1, 2), slice(2, 6), slice(5, 8), slice(3, 3)])
def test_some_rows_are_those_rows_of_all(rows):
    maths, code = tables()
    payload = TaskTeachers({"maths": Scripted(maths), "*": Scripted(code)}).annotate([MIXED])[0]
    assert torch.equal(payload.logits(rows), payload.logits()[rows])


def test_a_teacher_reads_only_micro_batches_with_its_tasks_and_keeps_only_its_tokens():
    maths, code = Scripted(tables()[0]), Scripted(tables()[1])
    TaskTeachers({"maths": maths, "code": code}).annotate(BATCHES)
    assert maths.asked == [[[0, 2, 3, 5, 6, 7], [8, 9, 10]]]
    assert code.asked == [[[1, 4], [11, 12]]]


def test_a_teacher_without_a_token_is_not_run():
    maths, code = Scripted(tables()[0]), Scripted(tables()[1])
    TaskTeachers({"maths": maths, "code": code}).annotate([MATHS])
    assert (len(maths.asked), len(code.asked)) == (1, 0)


def test_a_teacher_whose_tokens_lie_on_another_rank_is_run():
    # Context parallelism: the sequence is here, its response tokens are not; the others wait in a collective.
    code = Scripted(tables()[1])
    without_tokens = micro_batch(("maths", "code"), (0, 0))
    payload = TaskTeachers({"maths": Scripted(tables()[0]), "code": code}).annotate([without_tokens])[0]
    assert code.asked == [[[]]]
    assert payload.logits().shape == (2, 5)


def test_one_teacher_of_several_tasks_is_asked_once():
    teacher = Scripted(tables()[0])
    (payload,) = TaskTeachers({"maths": teacher, "code": teacher}).annotate([MIXED])
    assert teacher.asked == [[list(range(8))]]
    assert torch.equal(payload.logits(), teacher.table[:8])


def test_a_teacher_is_handed_a_micro_batch_that_is_consistent():
    seen = []

    class Keeps(Scripted):
        def annotate(self, batches):
            seen.extend(batches)
            return super().annotate(batches)

    TaskTeachers({"code": Keeps(tables()[0]), "*": Scripted(tables()[1])}).annotate([MIXED])
    (batch,) = seen
    assert batch.teacher_input is batch.student
    assert batch.targets.tolist() == [101, 104]
    assert batch.sequence_of_token.tolist() == [1, 1]
    assert batch.token_scale.tolist() == [1, 4]
    assert batch.sampled_logprobs.tolist() == [-1, -4]


def test_other_prompts_for_the_teacher_stay_other_prompts():
    teacher = Scripted(torch.arange(40.0).unsqueeze(1))
    reads = dataclasses.replace(MIXED.student, token_rows=MIXED.student.token_rows + 20)
    hinted = dataclasses.replace(MIXED, teacher_input=reads)
    (payload,) = TaskTeachers({"code": teacher, "*": Scripted(torch.zeros(40, 1))}).annotate([hinted])
    assert payload.logits().squeeze(1).tolist() == [0, 21, 0, 0, 24, 0, 0, 0]


def test_stages_before_the_last_get_none():
    teachers = {task: Scripted(tables()[0], is_last_stage=False) for task in ("maths", "code")}
    assert TaskTeachers(teachers).annotate(BATCHES) == [None, None, None]
    assert all(len(teacher.asked) == 1 for teacher in teachers.values())


def test_types_of_different_teachers_meet_in_the_wider_one():
    low = (torch.tensor([0, 2]), Scripted(torch.zeros(9, 2, dtype=torch.bfloat16)).annotate([CODE_AT_0])[0])
    high = (torch.tensor([1, 3]), Scripted(torch.full((9, 2), 1 / 3)).annotate([CODE_AT_0])[0])
    logits = TaskPayload((low, high)).logits()
    assert logits.dtype == torch.float32
    assert logits[1, 0] == torch.tensor(1 / 3)


CODE_AT_0 = micro_batch(("code",), (0, 0))


def test_a_task_without_a_teacher_is_named():
    with pytest.raises(DataError, match=r"the task 'code', but the teachers answer maths.*\*=PATH"):
        TaskTeachers({"maths": Scripted(tables()[0])}).annotate(BATCHES)


def test_whole_distributions_and_likely_tokens_are_not_put_together():
    class Likely(Scripted):
        def annotate(self, batches):
            return [TopKPayload(torch.zeros(1, 1), torch.zeros(1, 1)) for _ in batches]

    teachers = TaskTeachers({"maths": Scripted(tables()[0]), "code": Likely(tables()[0])})
    assert isinstance(teachers.annotate([CODE])[0], TopKPayload)
    with pytest.raises(ConfigError, match="a TopKPayload from one of their teachers"):
        teachers.annotate([MIXED])
