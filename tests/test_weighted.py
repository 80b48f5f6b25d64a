"""WEIGHT*THING,WEIGHT*THING means one thing, or is refused."""

import pytest

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.weighted import split_weighted


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a", [(1.0, "a")]),
        (" a,b(c=1) ", [(1.0, "a,b(c=1)")]),
        ("0.5*a", [(0.5, "a")]),
        ("3*a, -.5 * b", [(3.0, "a"), (-0.5, "b")]),
        ("1e-1*g:x,y(n=[1,2]),2*f.jsonl", [(0.1, "g:x,y(n=[1,2])"), (2.0, "f.jsonl")]),
        ("1*http://h:1/a,1*m:f", [(1.0, "http://h:1/a"), (1.0, "m:f")]),
    ],
)
def test_a_comma_separates_only_before_a_weight(text, pairs):
    assert split_weighted("reward", text) == pairs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,2*b", "reward 'a,2[*]b': 'a' has no weight.*WEIGHT[*]NAME,WEIGHT[*]NAME"),
        ("", "names nothing"),
        ("1*a,1*", "names nothing"),
        ("0*a,1*b", "gives 'a' the weight 0.0: expected a finite number that is not 0"),
        ("nan*a", "the weight nan"),
        ("1*a,inf*b", "gives 'b' the weight inf"),
        ("1*a,2*a", "names a more than once"),
    ],
)
def test_what_could_mean_two_things_or_nothing_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        split_weighted("reward", text)
