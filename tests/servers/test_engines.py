"""Both clients against a server with a real model: they give what it sampled and read, and refuse rubbish."""

import re

import pytest
import torch

from megatron_hybrid.errors import ServerError
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.servers.build import build_engine
from megatron_hybrid.servers.engine import Sampling
from megatron_hybrid.servers.sglang import SglangEngine
from megatron_hybrid.servers.vllm import VllmEngine
from tests.checkpoint.tiny_llama import VOCAB, make_folder
from tests.engine_server import serve_model
from tests.http_server import serve

PROMPTS = [([5, 9, 20], 11), ([7], 12), ([30, 31, 32, 33, 34], 13)]
SAMPLING = Sampling(max_tokens=6, stop_ids=(1, 8))
ENGINES = {"vllm": VllmEngine, "sglang": SglangEngine}


def engine(api, url, **settings):
    return ENGINES[api](
        url, "the test server", **{"at_once": 3, "timeout_s": 30, "retries": 0, "pause_s": 0.001} | settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    make_folder(path / "first", num_layers=2)
    make_folder(path / "second", num_layers=2, attention_bias=False, hidden_act="gelu")
    return path


@pytest.fixture(scope="module")
def served(folder):
    with serve_model(folder / "first") as found:
        yield found


@pytest.mark.parametrize("api", ENGINES)
def test_responses_come_with_the_log_probs_of_the_model_that_drew_them(api, served):
    server, url = served
    found = engine(api, url).complete(PROMPTS, 4, SAMPLING)
    assert [len(group) for group in found] == [4, 4, 4]
    endings = set()
    for (ids, _), group in zip(PROMPTS, found, strict=True):
        for response in group:
            own = server.log_probs([*ids, *response.token_ids])[len(ids) - 1 : -1]
            expected = own[range(len(response.token_ids)), response.token_ids]
            # The server reads a prefix at a time, this reads all: fp32 sums of another order.
            torch.testing.assert_close(torch.tensor(response.log_probs), expected, rtol=1e-5, atol=1e-5)
            stopped = response.token_ids[-1] in SAMPLING.stop_ids
            assert response.truncated is not stopped and (stopped or len(response.token_ids) == 6)
            endings.add(stopped)
    assert endings == {True, False}, "both ways to end were seen"


def test_seeds_repeat_responses_and_samples_of_one_prompt_differ(served):
    _, url = served
    first, again = (engine("vllm", url).complete(PROMPTS, 4, SAMPLING) for _ in range(2))
    other = engine("vllm", url).complete([(ids, seed + 100) for ids, seed in PROMPTS], 4, SAMPLING)
    assert first == again != other
    assert len({response.token_ids for response in first[1]}) > 1


@pytest.mark.parametrize("api", ENGINES)
@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_the_likeliest_tokens_are_those_of_the_model_even_where_the_text_is_unlikely(api, k, served):
    server, url = served
    texts = [([5, 9, 20, 40, 41], 3), ([7, 60], 1)]
    for (ids, first), found in zip(texts, engine(api, url).top_tokens(texts, k), strict=True):
        assert len(found) == len(ids) - first
        for position, top in enumerate(found, start=first):
            expected = server.log_probs(ids)[position - 1].topk(k)
            assert [token for token, _ in top] == expected.indices.tolist()
            torch.testing.assert_close(torch.tensor([value for _, value in top]), expected.values)


@pytest.mark.parametrize("api", ENGINES)
def test_new_weights_are_taken_from_a_folder(api, folder):
    with serve_model(folder / "first") as (server, url):
        client = engine(api, url)
        before = client.top_tokens([([5, 9], 1)], 3)
        client.load_weights(str(folder / "second"))
        assert server.loaded == [str(folder / "second")]
        after = client.top_tokens([([5, 9], 1)], 3)
        assert before != after
        if api == "vllm":
            assert "/reset_prefix_cache" in [path for path, _ in server.asked], "or it would go on from the old cache"


@pytest.mark.parametrize(
    ("api", "answer", "message"),
    [
        ("sglang", (200, {"success": False, "message": "no folder"}), "did not take the weights in /x.*no folder"),
        ("vllm", (404, "Not Found"), "/collective_rpc refuses with status 404"),
    ],
)
def test_a_refusal_of_weights_is_an_error(api, answer, message):
    with serve(lambda path, body: answer) as url, pytest.raises(ServerError, match=message):
        engine(api, url).load_weights("/x")


def test_a_server_that_is_busy_now_and_then_loses_no_request(served):
    server, url = served
    calls = []

    def now_and_then(path, body):
        calls.append(path)
        return (503, "busy") if len(calls) % 2 else server.answer(path, body)

    with serve(now_and_then) as flaky:
        found = engine("vllm", flaky, retries=10).complete(PROMPTS, 2, SAMPLING)
    assert found == engine("vllm", url).complete(PROMPTS, 2, SAMPLING)
    assert len(calls) >= 6


def test_a_server_that_is_down_is_said_once_by_all_requests(caplog):
    with serve(lambda path, body: (503, "starting")) as url:
        ours = engine("vllm", url, retries=1)
        for _ in range(2):
            assert all(isinstance(group, ServerError) for group in ours.complete(PROMPTS, 2, SAMPLING))
    said = [message for message in caplog.messages if message.startswith(f"the test server at {url} is down")]
    assert len(said) == 1


def choice(**changes):
    whole = {"index": 0, "finish_reason": "stop", "token_ids": [4, 1], "logprobs": {"token_logprobs": [-1.0, -2.0]}}
    return {"choices": [whole | changes]}


def generated(**changes):
    pairs = [[-1.0, 4, None], [-2.0, 1, None]]
    return {"meta_info": {"finish_reason": {"type": "stop"}, "output_token_logprobs": pairs} | changes}


@pytest.mark.parametrize(
    ("api", "said", "message"),
    [
        ("vllm", {}, "gives no 'choices'.*return_token_ids"),
        ("vllm", choice(token_ids=None), "return_token_ids"),
        ("vllm", choice(logprobs=None), "which a rollout is made of"),
        ("vllm", choice(token_ids=[4]), "with a log-prob for every token"),
        ("vllm", choice(token_ids=[], logprobs={"token_logprobs": []}), "with a log-prob for every token"),
        ("vllm", choice(logprobs={"token_logprobs": [-1.0, None]}), "with a log-prob for every token"),
        ("vllm", choice(logprobs={"token_logprobs": [-1.0, 3.0]}), "with a log-prob for every token"),
        ("vllm", choice(token_ids=[4, "1"]), "with a log-prob for every token"),
        ("vllm", choice(token_ids=[4] * 7, logprobs={"token_logprobs": [-1.0] * 7}), "of at most 6 tokens"),
        ("vllm", choice(finish_reason="abort"), "each ended"),
        ("vllm", '{"choices": [{"index": 0, "fin', "no JSON"),
        ("vllm", {"choices": []}, "should give 1 responses"),
        ("sglang", {}, "nothing that a rollout can be made of"),
        ("sglang", [generated(), generated()], "should give 1 responses"),
        ("sglang", generated(finish_reason={"type": "abort"}), "each ended"),
        ("sglang", generated(output_token_logprobs=[]), "with a log-prob for every token"),
        ("sglang", generated(output_token_logprobs=[[None, 4, None]]), "with a log-prob for every token"),
    ],
)
def test_a_response_that_cannot_be_used_is_asked_for_again_and_then_shown(api, said, message):
    calls = []

    def answer(path, body):
        calls.append(path)
        return 200, said

    with serve(answer) as url:
        (found,) = engine(api, url, retries=2).complete(PROMPTS[:1], 1, SAMPLING)
    assert isinstance(found, ServerError) and re.search(message, str(found))
    assert len(calls) == 3, "a bad answer may pass, as a busy server does"


@pytest.mark.parametrize(
    ("api", "said", "message"),
    [
        ("vllm", choice(), "gives no prompt_logprobs"),
        ("vllm", choice(prompt_logprobs=[None, None]), "gives no prompt_logprobs"),
        ("vllm", choice(prompt_logprobs=[None]), "the 1 likeliest tokens at each of 2 positions"),
        ("vllm", choice(prompt_logprobs=[None, {}]), "the 1 likeliest tokens at each of 2 positions"),
        ("vllm", choice(prompt_logprobs=[None, {"3": {"logprob": 1.0}}]), "the 1 likeliest tokens"),
        ("sglang", generated(), "no input_top_logprobs"),
        ("sglang", generated(input_top_logprobs=[None, []]), "the 1 likeliest tokens at each of 2 positions"),
    ],
)
def test_positions_that_cannot_be_used_are_shown(api, said, message):
    with serve(lambda path, body: (200, said)) as url, pytest.raises(ServerError, match=message):
        engine(api, url).top_tokens([([5, 9], 1)], 1)


@pytest.mark.parametrize("api", ENGINES)
def test_the_settings_choose_the_engine(api):
    built = build_engine("http://host:1/v1", "the teacher", OnlineConfig(server_api=api, server_requests=3))
    assert isinstance(built, ENGINES[api])


@pytest.mark.parametrize(("api", "path"), [("vllm", "/v1/completions"), ("sglang", "/generate")])
def test_a_key_of_our_own_variable_goes_along_and_no_other(api, path, served, monkeypatch):
    server, _ = served
    monkeypatch.setenv("OPENAI_API_KEY", "secret")  # meant for somebody else
    monkeypatch.delenv("HYBRID_SERVER_API_KEY", raising=False)
    with serve(server.answer, key="secret") as url:
        with pytest.raises(ServerError, match=f"{path} refuses with status 401"):
            engine(api, url).top_tokens([([5, 9], 1)], 3)
        monkeypatch.setenv("HYBRID_SERVER_API_KEY", "secret")
        assert len(engine(api, url).top_tokens([([5, 9], 1)], 3)[0][0]) == 3


def test_v1_is_not_doubled(served):
    _, url = served
    assert len(engine("vllm", f"{url}/v1/").top_tokens([([5, 9], 1)], 3)[0][0]) == 3


def test_weights_that_a_server_cannot_load_are_not_offered_again():
    asked = []

    def answer(path, body):
        asked.append(path)
        return 500, "shapes differ"

    with serve(answer) as url, pytest.raises(ServerError, match="refuses with status 500. It answered: shapes differ"):
        engine("vllm", url, retries=3).load_weights("/x")
    assert asked == ["/collective_rpc"]
