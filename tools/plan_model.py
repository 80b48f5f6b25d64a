"""What a plan is made for: student, teacher, layout and step, as plain numbers that fit one another. No torch.

    Layout    ranks = tp x pp x cp x dp, vpp virtual stages on each
    Step      one optimizer step: responses, their lengths, what the teacher leaves, which head
    Plan      all of them, checked together

Not here: weights shared out by FSDP, expert parallelism.
"""

import math
from dataclasses import dataclass

from plan_shapes import Shape

from megatron_hybrid.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """How the ranks are shared out; tp innermost, as Megatron orders them."""

    ranks: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("ranks", "tp", "pp", "vpp", "cp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        model = self.tp * self.pp * self.cp
        if self.ranks % model:
            raise ConfigError(
                f"--ranks is {self.ranks}, but one replica takes TP {self.tp} x PP {self.pp} x CP {self.cp} = {model} "
                f"ranks: the rest would stand idle. Choose a multiple of {model}."
            )
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(
                f"--vpp is {self.vpp} at --pp 1: virtual stages interleave a pipeline, and there is none. Leave out "
                "--vpp, or raise --pp."
            )

    @property
    def dp(self) -> int:
        return self.ranks // (self.tp * self.pp * self.cp)

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    def stage_layers(self, shape: Shape) -> tuple[int, int]:
        """Layers on the first and on the last rank of a pipeline.

        Even, or with the embedding and the loss counted as one layer each, where the depth asks for it (Megatron's
        --account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split).

        Raises:
            ConfigError: neither divides.
        """
        if shape.layers % self.stages == 0:
            return shape.layers // self.pp, shape.layers // self.pp
        if self.ends_count_as_layers(shape):
            whole = (shape.layers + 2) // self.pp
            return whole - 1, whole - 1
        raise ConfigError(
            f"{shape.name} has {shape.layers} layers, which {self.stages} stages (PP {self.pp} x VPP {self.vpp}) "
            f"cannot share evenly, nor {shape.layers + 2} with embedding and loss counted as a layer each. Choose "
            f"stages that divide {shape.layers} or {shape.layers + 2}."
        )

    def ends_count_as_layers(self, shape: Shape) -> bool:
        """Whether the stages share the layers only with embedding and loss among them."""
        return shape.layers % self.stages > 0 and (shape.layers + 2) % self.stages == 0 and shape.layers > self.stages


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    responses: int
    """Of all replicas."""
    seq_length: int
    """Tokens of prompt and response together."""
    response_tokens: int
    micro_batch: int = 1
    rollout_batch: int = 64
    """Sequences decoded together on a replica."""
    group_size: int = 4
    """Responses to one prompt, which is read once for those that are decoded together."""
    payload: str = "hidden"
    topk: int = 64
    head: str = "fused"
    """fused: logits of a chunk of tokens at a time; logits: of a whole micro-batch. `HybridConfig.lm_head`."""
    chunk: int | None = None
    """Tokens of a chunk, `HybridConfig.lm_head_chunk_size`; None: the most that the trainer takes on a GPU."""
    dtype_bytes: int = 2
    """Of weights and activations: 2 bf16, 4 fp32."""
    distributed_optimizer: bool = True
    vocab_multiple: int = 128
    """Megatron's --make-vocab-size-divisible-by."""
    gradient_norms: bool = True
    """A step that measures the dense and sparse gradient norms, as the first one and every tenth do."""
    rollout_correction: str = "token_truncate"
    """`HybridConfig.rollout_correction`."""
    prefix_correction: bool = False

    @property
    def prompt_tokens(self) -> int:
        return self.seq_length - self.response_tokens


@dataclass(frozen=True)
class Plan:
    """Everything, checked together.

    Raises:
        ConfigError: something does not divide, or does not belong together.
    """

    student: Shape
    teacher: Shape | None
    layout: Layout
    step: Step

    def __post_init__(self) -> None:
        layout, step = self.layout, self.step
        for shape in self.shapes:
            layout.stage_layers(shape)
            _check_heads(shape, layout)
        if self.teacher is not None and self.teacher.vocab != self.student.vocab:
            raise ConfigError(
                f"{self.student.name} has {self.student.vocab} tokens and {self.teacher.name} {self.teacher.vocab}: "
                "the KL compares them one by one, so student and teacher need one tokenizer. Choose another teacher."
            )
        if not 0 < step.response_tokens < step.seq_length:
            raise ConfigError(
                f"--response-tokens is {step.response_tokens}, --seq-length {step.seq_length}: a response needs a "
                "prompt in front of it and at least one token. Choose fewer, or a longer sequence."
            )
        per_pass = layout.dp * step.micro_batch
        if step.responses % per_pass:
            raise ConfigError(
                f"--responses is {step.responses}, but DP {layout.dp} x --micro-batch {step.micro_batch} = {per_pass} "
                f"are read at a time: micro-batches must be whole. Choose a multiple of {per_pass}."
            )
        if layout.vpp > 1 and self.num_microbatches % layout.pp:
            raise ConfigError(
                f"a replica has {self.num_microbatches} micro-batches a step, interleaved stages (VPP {layout.vpp}) "
                f"take them in groups of PP {layout.pp}. Choose --responses so that they divide."
            )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    @property
    def rows(self) -> int:
        """Responses of a replica."""
        return self.step.responses // self.layout.dp

    @property
    def num_microbatches(self) -> int:
        return self.rows // self.step.micro_batch

    @property
    def columns(self) -> int:
        """v/tp: columns of logits on a rank, padding included, as Megatron pads."""
        multiple = self.step.vocab_multiple * self.layout.tp
        return math.ceil(self.student.vocab / multiple) * self.step.vocab_multiple

    @property
    def width(self) -> int:
        """Positions of a row, on all context-parallel ranks together: the last token is not fed; padded as
        `schedule/layout.py` pads."""
        chunks = 1 if self.layout.cp == 1 else 2 * self.layout.cp
        multiple = math.lcm(chunks, self.layout.cp * (self.layout.tp if self.layout.sequence_parallel else 1))
        return math.ceil((self.step.seq_length - 1) / multiple) * multiple

    @property
    def tokens(self) -> int:
        """n: response tokens of a micro-batch on the context-parallel rank that has most of them.

        Rank r holds chunks r and 2 cp - 1 - r of a row cut into 2 cp; responses stand at its end.
        """
        cp, step = self.layout.cp, self.step
        if cp == 1:
            return step.micro_batch * step.response_tokens
        length, first = self.width // (2 * cp), step.prompt_tokens - 1

        def inside(chunk: int) -> int:
            end = min(first + step.response_tokens, (chunk + 1) * length)
            return max(0, end - max(first, chunk * length))

        return step.micro_batch * max(inside(rank) + inside(2 * cp - 1 - rank) for rank in range(cp))


def _check_heads(shape: Shape, layout: Layout) -> None:
    tp = layout.tp
    if shape.heads % tp or shape.ffn % tp or (shape.groups % tp and tp % shape.groups):
        raise ConfigError(
            f"{shape.name} has {shape.heads} heads, {shape.groups} of keys and values, and an MLP of {shape.ffn}: TP "
            f"{tp} cannot cut them into equal parts. Choose a TP that divides all three (fewer heads of keys and "
            "values than TP are repeated where they divide it)."
        )
