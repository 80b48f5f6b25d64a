"""Rollouts of this package beside transformers' generate: same weights, prompts, dtype, temperature and threads.

python tools/bench_rollouts.py                      # SmolLM2-135M, 16 prompts x 4; some ten minutes on two cores
python tools/bench_rollouts.py --dtype bf16 --max-response 64 --repeats 5
python tools/bench_rollouts.py --never-stop         # every response runs to the limit

Both live in this process and take turns; each round has its own seed. transformers runs with its growing cache and with
its static one, and is compared by whichever was faster. Tokens are response tokens up to the first stop token, by which
both are counted. Each of our log-probabilities is held against transformers' full forward pass over the same tokens.
Timings are only as good as the machine is quiet: its load is printed, and tokens per second of CPU beside those of the
clock, which with --threads 1 a busy machine disturbs less.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_hybrid.records import Prompt, RolloutBatch
    from megatron_hybrid.rollouts.generate import Sampler

PROMPTS = "reasoning_gym:calendar_arithmetic,count_primes,syllogism,time_intervals"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
OURS, GROWING, STATIC = "megatron_hybrid", "transformers, growing cache", "transformers, static cache"


@dataclass
class Result:
    """One contender at one setting, all rounds together."""

    name: str
    dtype: str
    max_response: int
    prompts: int = 0
    responses: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all threads: what a busy machine disturbs less."""
    error: float | None = None
    """Largest difference of a log-probability from a full forward pass, nats; ours only."""

    @property
    def tokens_per_s(self) -> float:
        """Response tokens in a second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        """Response tokens in a second of one core."""
        return self.tokens / self.cpu_seconds


@dataclass(frozen=True)
class Bench:
    """One model in both libraries, and what they are asked."""

    sampler: "Sampler"
    ours: Any
    theirs: Any
    prompts: "list[Prompt]"
    group_size: int
    stop_id: int | None
    pad_id: int

    def sample(self, seed: int) -> "RolloutBatch":
        """A group for each prompt, by this package."""
        return self.sampler.sample([self.ours], self.prompts, self.group_size, step=0, seed=seed)

    def generate(self, seed: int, cache: str) -> "Tensor":
        """The same by transformers, all prompts in one batch: responses [b, s], padded behind their stop token."""
        import torch

        torch.manual_seed(seed)
        width = max(len(prompt.token_ids) for prompt in self.prompts)
        ids = torch.full((len(self.prompts), width), self.pad_id)
        for row, prompt in enumerate(self.prompts):
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        starts = width - torch.tensor([len(prompt.token_ids) for prompt in self.prompts])
        with torch.no_grad():
            out = self.theirs.generate(
                input_ids=ids,
                attention_mask=(torch.arange(width) >= starts[:, None]).long(),
                do_sample=True,
                temperature=self.sampler.temperature,
                top_k=0,
                top_p=1.0,
                num_return_sequences=self.group_size,
                max_new_tokens=self.sampler.max_response_length,
                eos_token_id=self.stop_id,
                pad_token_id=self.pad_id,
                cache_implementation=cache,
            )
        return out[:, width:]

    def count(self, responses: "Tensor") -> int:
        """Tokens up to the first stop token, which counts."""
        stops = responses == (-1 if self.stop_id is None else self.stop_id)
        behind = stops.cumsum(dim=1) - stops.long()
        return int((behind == 0).sum())

    def error(self, batch: "RolloutBatch") -> float:
        """Largest difference of our log-probabilities from transformers' full forward pass."""
        import torch

        worst = 0.0
        for start in range(0, len(batch.tokens), 8):  # whole logits, a few rows at a time
            rows = slice(start, start + 8)
            with torch.no_grad():
                logits = self.theirs(batch.tokens[rows]).logits[:, :-1].float() / self.sampler.temperature
            full = logits.log_softmax(-1).gather(-1, batch.tokens[rows, 1:, None]).squeeze(-1)
            wrong = (full - batch.sampled_logprobs[rows, 1:])[batch.response_mask[rows, 1:]]
            worst = max(worst, wrong.abs().max().item())
        return worst


@contextlib.contextmanager
def bench(options: argparse.Namespace, dtype: str, max_response: int) -> Iterator[Bench]:
    """Both models loaded, Megatron's parallel state in place."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_hybrid.checkpoint.convert import hf_to_megatron
    from megatron_hybrid.checkpoint.folders import load_hf_folder
    from megatron_hybrid.checkpoint.hf_config import hf_config_to_megatron_args
    from megatron_hybrid.mcore.checkpoint_io import build_gpt, load_weights, single_rank
    from megatron_hybrid.parallel import ParallelContext
    from megatron_hybrid.prompts.sources import open_source
    from megatron_hybrid.prompts.stream import PromptStream
    from megatron_hybrid.prompts.template import PromptTemplate
    from megatron_hybrid.rollouts.generate import Sampler

    kind = getattr(torch, DTYPES[dtype])
    tokenizer = AutoTokenizer.from_pretrained(str(options.model))
    state, config = load_hf_folder(options.model)
    args = hf_config_to_megatron_args(config)
    template = PromptTemplate(tokenizer, system_prompt="")
    room = config["max_position_embeddings"] - max_response
    stream = PromptStream(open_source(options.prompts), template, seed=0, max_prompt_length=room)
    stop_id = None if options.never_stop else tokenizer.eos_token_id
    # Loaded while torch is itself: under the CPU stand-ins transformers would leave its rotary frequencies unset.
    theirs = AutoModelForCausalLM.from_pretrained(str(options.model), dtype=kind).eval()
    with single_rank():
        model_parallel_cuda_manual_seed(0)  # Megatron's attention forks this state, even without dropout
        model = build_gpt(args, dtype=kind).eval()
        load_weights(model, {name: value.to(kind) for name, value in hf_to_megatron(state, args).items()})
        yield Bench(
            sampler=Sampler(
                parallel=ParallelContext(),
                device=torch.device("cpu"),
                vocab_size=args["vocab_size"],
                stop_ids=frozenset() if stop_id is None else frozenset({stop_id}),
                decode=lambda ids: "",
                temperature=options.temperature,
                max_response_length=max_response,
                batch_size=options.num_prompts * options.group_size,
            ),
            ours=model,
            theirs=theirs,
            prompts=stream.draw(0, options.num_prompts),
            group_size=options.group_size,
            stop_id=stop_id,
            pad_id=tokenizer.eos_token_id,
        )


def measure(options: argparse.Namespace, dtype: str, max_response: int, say: Callable[[str], None]) -> list[Result]:
    """Every contender over all rounds; one more before them warms up and is checked."""
    results = {name: Result(name, dtype, max_response) for name in (OURS, GROWING, STATIC)}
    with bench(options, dtype, max_response) as setting:
        for round_ in range(options.repeats + 1):
            say(
                f"{dtype}, {max_response} tokens: "
                + (f"round {round_} of {options.repeats}" if round_ else "warming up")
            )
            for name, cache in ((OURS, None), (GROWING, "dynamic"), (STATIC, "static")):
                result = results[name]
                started, cpu_started = time.perf_counter(), time.process_time()
                out = setting.sample(round_) if cache is None else setting.generate(round_, cache)
                took, cpu_took = time.perf_counter() - started, time.process_time() - cpu_started
                if round_ == 0:
                    result.error = setting.error(out) if cache is None else None
                    continue
                result.seconds += took
                result.cpu_seconds += cpu_took
                result.prompts += len(setting.prompts)
                result.responses += len(out.tokens) if cache is None else len(out)
                result.tokens += int(out.response_mask.sum()) if cache is None else setting.count(out)
    return list(results.values())


def report(results: list[Result], options: argparse.Namespace) -> None:
    """One table; the faster of transformers is the unit of each setting."""
    from rich.console import Console
    from rich.table import Table

    what = f"{options.num_prompts} prompts x {options.group_size}, {options.threads} threads"
    columns = ("dtype", "max response", "", "tokens", "s", "tokens/s", "x", "tokens/CPU s", "x", "log-prob error")
    shown = Table(*columns, title=what)
    for result in results:
        rivals = [
            rival
            for rival in results
            if (rival.dtype, rival.max_response) == (result.dtype, result.max_response) and rival.name != OURS
        ]
        shown.add_row(
            result.dtype,
            str(result.max_response),
            result.name,
            str(result.tokens),
            f"{result.seconds:.1f}",
            f"{result.tokens_per_s:.1f}",
            f"{result.tokens_per_s / max(rival.tokens_per_s for rival in rivals):.2f}",
            f"{result.tokens_per_cpu_s:.1f}",
            f"{result.tokens_per_cpu_s / max(rival.tokens_per_cpu_s for rival in rivals):.2f}",
            "" if result.error is None else f"{result.error:.1e}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def main() -> int:
    """Measures every setting, prints the table, and writes it with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = Path(os.environ.get("MEGATRON_HYBRID_CACHE", "~/.cache/megatron_hybrid")).expanduser() / "models"
    parser.add_argument(
        "--model",
        type=Path,
        help="Hugging Face folder of a Llama-shaped model; default: SmolLM2-135M-Instruct, made once",
    )
    parser.add_argument("--prompts", default=PROMPTS, help="as --hybrid-prompts takes them")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4, help="responses to each prompt")
    parser.add_argument("--max-response", type=int, nargs="+", default=[16, 64], help="tokens of a response at most")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--never-stop", action="store_true", help="no stop token: every response runs to the limit")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a checkout needs no installation
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from megatron_hybrid.checkpoint.smollm2 import export_smollm2

    torch.set_num_threads(options.threads)
    if options.model is None:
        options.model = export_smollm2(models / "smollm2-hf")
    results: list[Result] = []
    for dtype in options.dtype:
        for max_response in options.max_response:
            results += measure(options, dtype, max_response, lambda text: print(text, file=sys.stderr, flush=True))
            report(results, options)  # so far: a run of minutes may be cut short
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    if options.out is not None:
        rows = [asdict(result) | {"tokens_per_s": result.tokens_per_s} for result in results]
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
