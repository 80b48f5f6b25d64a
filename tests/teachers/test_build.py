"""What `teacher_load` says is what is put together."""

import math

import pytest
import torch

from megatron_hybrid.parallel import GroupView
from megatron_hybrid.teachers import topk
from megatron_hybrid.teachers.build import build_teacher
from megatron_hybrid.teachers.mixture import MixtureTeacher
from megatron_hybrid.teachers.spec import parse_teachers
from megatron_hybrid.teachers.tasks import TaskTeachers
from megatron_hybrid.teachers.topk import TopKTeacher
from tests.teachers.scripted import Scripted, micro_batch


def build(text):
    loaded = {}

    def load(source):
        assert source not in loaded, "loaded twice"
        loaded[source] = Scripted(torch.zeros(1, 1))
        return loaded[source]

    return loaded, build_teacher(parse_teachers(text), load, vocab_size=3, temperature=2.0, tp=GroupView())


def test_one_path_is_that_teacher():
    loaded, teacher = build("a")
    assert teacher is loaded["a"]


def test_a_teacher_of_two_tasks_is_loaded_once():
    loaded, teacher = build("maths=a,code=self,*=a")
    assert isinstance(teacher, TaskTeachers)
    assert teacher.teacher_of_task == {"maths": loaded["a"], "code": loaded["self"], "*": loaded["a"]}


def test_a_mixture_has_the_weights_and_the_temperature_of_the_settings():
    loaded, teacher = build("3*a,1*b")
    assert isinstance(teacher, MixtureTeacher)
    assert teacher.teachers == (loaded["a"], loaded["b"])
    assert teacher.log_weights == (math.log(0.75), math.log(0.25))
    assert (teacher.vocab_size, teacher.temperature) == (3, 2.0)


@pytest.mark.parametrize("text", ["maths=a,code=b", "3*a,1*b"])
def test_the_likely_tokens_of_several_teachers_are_those_of_their_whole_answer(monkeypatch, text):
    monkeypatch.setattr(topk, "CHUNK_TOKENS", 2)  # logits in parts
    tables = {"a": torch.randn(5, 7), "b": torch.randn(5, 7)}
    options = {"vocab_size": 7, "temperature": 2.0, "tp": GroupView()}
    teacher = build_teacher(parse_teachers(text), lambda source: Scripted(tables[source]), **options)
    batch = micro_batch(("maths", "code"), (0, 1, 0, 1, 1))
    (whole,), (likely,) = teacher.annotate([batch]), TopKTeacher(teacher, 3, **options).annotate([batch])
    expected = (whole.logits() / 2.0).log_softmax(-1).topk(3)
    assert torch.equal(likely.ids, expected.indices)
    torch.testing.assert_close(likely.log_probs, expected.values)
