"""The mean of the product's gradient is the gradient of J: a real Megatron GPT, every response, no sampling."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.enumeration import Method, objective, product
from tests.distributed.gradient import FP32, assert_same, errors, whole

UNBIASED = [
    Method(),
    Method(future_cost="sampled"),
    Method(baseline="running_mean"),
    Method(baseline="rloo"),
    Method(baseline="rloo", future_cost="sampled"),
    Method(baseline="rloo", cost_baseline="group"),
    Method(baseline="rloo", cost_baseline="group", future_cost="sampled"),
    Method(sampler="other"),
    Method(sampler="other", future_cost="sampled"),
    Method(sampler="other", baseline="rloo", cost_baseline="group"),
]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 2, sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
    "CP 2": (2, {"context_parallel_size": 2}),
    "DP 2": (2, {}),
}


def name(method: Method) -> str:
    given = {key: value for key, value in vars(method).items() if value != getattr(Method(), key)}
    return ", ".join(f"{key} {value}" for key, value in given.items()) or "closed form"


@pytest.fixture(scope="module")
def truth(rank_pool) -> dict[str, Any]:
    ((result),) = rank_pool(1, init=False).run(objective, {}, False)
    return result


def mean(rank_pool, method: Method, truth: dict[str, Any], size: int = 1, layout: dict[str, Any] | None = None) -> Any:
    return whole(rank_pool(size, init=False).run(product, layout or {}, method, truth["sampled"]), vocab_size=4)


@pytest.mark.parametrize("method", UNBIASED, ids=name)
def test_the_mean_over_all_responses_is_the_gradient_of_the_objective(rank_pool, truth, method: Method):
    assert_same(mean(rank_pool, method, truth), whole([truth], vocab_size=4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "method", [Method(baseline="rloo", cost_baseline="group"), Method(sampler="other")], ids=["on-policy", "off-policy"]
)
def test_it_is_so_on_every_kind_of_layout(rank_pool, truth, method: Method, layout: str):
    size, flags = LAYOUTS[layout]
    assert_same(mean(rank_pool, method, truth, size, flags), whole([truth], vocab_size=4))


@pytest.mark.parametrize("baseline", ["grpo", "reinforce_plus_plus"])
def test_a_standardised_reward_climbs_another_objective_exactly(rank_pool, truth, baseline: str):
    """Biased: the deviation of a group, or of the batch, depends on the response that it divides."""
    other = whole(rank_pool(1, init=False).run(objective, {}, True), vocab_size=4)
    found = mean(rank_pool, Method(baseline=baseline), truth)
    assert_same(found, other)
    assert max(errors(found, whole([truth], vocab_size=4)).values()) > 0.1


@pytest.mark.parametrize("change", [{"discount": 0.0}, {"discount": 0.95}])
def test_a_discount_below_one_is_another_gradient(rank_pool, truth, change: dict[str, float]):
    found = mean(rank_pool, Method(**change), truth)
    assert max(errors(found, whole([truth], vocab_size=4)).values()) > 1000 * FP32
