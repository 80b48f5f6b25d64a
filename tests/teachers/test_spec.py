"""The text of `teacher_load` means one thing, or is refused with what to write instead."""

import pytest

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.teachers.spec import TeacherSpec, parse_teachers


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a/b", TeacherSpec(("a/b",))),
        ("self", TeacherSpec(("self",))),
        (" a ", TeacherSpec(("a",))),
        ("./lr=3/c", TeacherSpec(("./lr=3/c",))),
        ("maths=a,code=b,*=a", TeacherSpec(("a", "b"), source_of_task={"maths": "a", "code": "b", "*": "a"})),
        ("maths=a", TeacherSpec(("a",), source_of_task={"maths": "a"})),
        ("*=lr=3/c, maths = self", TeacherSpec(("lr=3/c", "self"), source_of_task={"*": "lr=3/c", "maths": "self"})),
        ("0.75*a,0.25*b", TeacherSpec(("a", "b"), weights=(0.75, 0.25))),
        ("3*a, 1*/b=c", TeacherSpec(("a", "/b=c"), weights=(0.75, 0.25))),
        ("2*a", TeacherSpec(("a",), weights=(1.0,))),
    ],
)
def test_each_form_is_read_as_it_is_written(text, spec):
    assert parse_teachers(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty path.*Expected PATH"),
        ("maths=", "empty path"),
        ("0.5*a,0.5*", "empty path"),
        ("a,b", "2 parts that are not all of one form.*Expected PATH, TASK=PATH"),
        ("maths=a,b", "not all of one form"),
        ("0.5*a,maths=b", "not all of one form"),
        ("0.5*a,b", "not all of one form"),
        ("maths=a,maths=b", "names the task maths more than once.*Name it once"),
        ("0.5*a,0.5*a", "names the checkpoint a more than once"),
        ("0*a,1*b", "the weight 0.0: .* > 0"),
        ("-1*a,2*b", "the weight -1.0"),
        ("nan*a,2*b", "the weight nan"),
        ("inf*a,2*b", "the weight inf"),
    ],
)
def test_what_could_mean_two_things_or_nothing_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_teachers(text)


def test_every_task_of_the_prompts_needs_a_teacher():
    spec = parse_teachers("maths=a,code=b")
    spec.check_tasks(["maths", "code"])
    with pytest.raises(ConfigError, match=r"maths, code, but the prompts also have the task chess.*Add TASK=PATH"):
        spec.check_tasks(["maths", "code", "chess"])
    parse_teachers("maths=a,*=b").check_tasks(["maths", "code", "chess"])


def test_a_task_that_the_prompts_do_not_have_is_refused_even_beside_a_star():
    with pytest.raises(ConfigError, match="the task math, but the prompts have only code, maths.*Correct the name"):
        parse_teachers("math=a,*=b").check_tasks(["maths", "code"])


def test_one_teacher_and_mixtures_answer_every_task():
    parse_teachers("a").check_tasks(["maths"])
    parse_teachers("1*a,1*b").check_tasks(["maths"])
