"""What travels between the rooms: frozen records, each field saying its shape and who fills it.

Letters: b sequences, s positions, n response tokens of a micro-batch, h hidden, v vocabulary, tp tensor-parallel ranks.
Batch first up to `schedule/microbatch.py`, sequence first (Megatron's order) after it. `torch` is only named in
annotations here: importing the records costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RecordedResponse:
    """One response as a file holds it, filled by `prompts/recorded.py`."""

    token_ids: tuple[int, ...]
    """As the student is to learn it, the end-of-sequence token included where there is one; at least one."""
    log_probs: tuple[float, ...] | None
    """[len(token_ids)], nats, of whoever sampled it; None: nobody wrote them down."""
    truncated: bool
    """It was cut off before an end-of-sequence token."""
    entry: dict[str, Any]
    """For the reward, as `Prompt.entry`: where the response stands in its file, and its record."""


@dataclass(frozen=True)
class Prompt:
    """One question, filled by `prompts`."""

    prompt_id: int
    """Position in the stream's order, unique over the run; seeds of its samples derive from it."""
    token_ids: tuple[int, ...]
    """The chat template applied, ready for the model; the response starts right after."""
    text: str
    """The question in words, for tables of samples."""
    task: str
    """Where it comes from: a reasoning-gym task, or the `task` field of a prompt file."""
    answer: str | None = None
    """The expected answer, where there is one."""
    entry: dict[str, Any] = field(default_factory=dict)
    """The source's own record, handed to the reward unchanged."""
    teacher_token_ids: tuple[int, ...] | None = None
    """What the teacher reads in front of the response, where that is not `token_ids` (a hint, a solution)."""
    responses: tuple[RecordedResponse, ...] = ()
    """Its group of responses, where a file holds them; in a RolloutBatch, that of the row alone."""


@dataclass(frozen=True)
class RolloutBatch:
    """Sampled responses of one data-parallel replica, filled by `rollouts`. Rows of one prompt are neighbours."""

    prompts: tuple[Prompt, ...]
    """[b]: the prompt of each row (a group repeats it)."""
    tokens: Tensor
    """[b, s] int64: prompt, response, then padding; s is the longest row."""
    response_mask: Tensor
    """[b, s] bool: True on the tokens the student sampled, end-of-sequence included. Set by the sampler alone."""
    sampled_logprobs: Tensor | None
    """[b, s] fp32, nats: under the sampling distribution; 0 off the mask and on stages that do not sample. None: nobody
    wrote them down, in the whole run: nothing can be corrected, or said of how far sampler and trainer are apart."""
    group_id: Tensor
    """[b] int64: rows with the same number answer the same prompt."""
    truncated: tuple[bool, ...]
    """[b]: the response ran out of room before an end-of-sequence token."""
    responses: tuple[str, ...]
    """[b]: the responses in words, special tokens removed."""
    temperature: float
    policy_version: int | None
    """Optimizer steps taken before sampling; None: no step of this run's."""
    seed: int
    unanswered: tuple[bool, ...] = ()
    """[b]: whoever samples gave no response: the row is its prompt alone, and its mask empty. (): all are answered."""

    def take(self, rows: Sequence[int]) -> RolloutBatch:
        """These rows, in this order."""
        index = list(rows)
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in index),
            tokens=self.tokens[index],
            response_mask=self.response_mask[index],
            sampled_logprobs=None if self.sampled_logprobs is None else self.sampled_logprobs[index],
            group_id=self.group_id[index],
            truncated=tuple(self.truncated[row] for row in index),
            responses=tuple(self.responses[row] for row in index),
            unanswered=tuple(self.unanswered[row] for row in index) if self.unanswered else (),
        )


@dataclass(frozen=True)
class RewardBatch:
    """Scores of a RolloutBatch, filled by `rewards`. A reward is maximised."""

    rewards: Tensor
    """[b] fp32."""
    breakdown: dict[str, Tensor] = field(default_factory=dict)
    """Name of a reward function to its unweighted scores [b] fp32."""
    failed: Tensor | None = None
    """[b] bool: a reward gave no number for it, which counts as a score of 0; None: for none."""
    errors: Mapping[int, Exception] = field(default_factory=dict)
    """Row to what went wrong, of the failed ones; on the rank that scored them only."""


@dataclass(frozen=True)
class TokenStats:
    """Per-token numbers of the op between its two passes, detached, equal on every tensor-parallel rank; fp32, nats."""

    kl: Tensor
    """[...]: KL(student || teacher) over the whole vocabulary; 0 without a teacher."""
    log_prob: Tensor
    """[...]: log pi(target)."""
    teacher_log_prob: Tensor
    """[...]: log q(target); 0 without a teacher."""
    entropy: Tensor
    """[...]: entropy of the student."""


Weigh = Callable[[TokenStats], "tuple[Tensor, Tensor]"]
"""Credit assignment as the op calls it: the stats to (imitation_weight, advantage), both fp32 in the stats' shape."""

ReverseWeigh = Callable[[TokenStats, Any], "tuple[float | Tensor, float | Tensor]"]
"""Credit assignment from the end: stats [r] of some rows, and which rows (a slice of the flattened target, or [r] int64
where the op skips rows), to (imitation_weight, advantage). Called once for each chunk in a forward, the last rows
first, every row once; it may remember what it saw. So a closed-form cost-to-go can be had if the later tokens of a
response have the later rows."""


class ReversibleWeigh:
    """A `Weigh` that may know its credit from the end, too."""

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        """As `Weigh`."""
        raise NotImplementedError

    def from_the_end(self) -> ReverseWeigh | None:
        """The same weights, asked from the last rows to the first, once; None: they need the stats of all tokens."""
        raise NotImplementedError


ALL_ROWS = slice(None)


class LogitsPayload:
    """A teacher's whole distributions for one micro-batch; their logits exist only while somebody reads them."""

    @property
    def num_tokens(self) -> int:
        """n: response tokens of this rank."""
        raise NotImplementedError

    def logits(self, rows: slice = ALL_ROWS) -> Tensor:
        """[rows, v/tp]: this rank's shard for these of the n response tokens, no gradient; not to be written into.

        May hold collectives over tensor-parallel ranks, which all read the same rows at the same time.
        """
        raise NotImplementedError

    def take(self, tokens: Tensor) -> LogitsPayload:
        """The payload of these tokens alone, [m] int64 ascending."""
        raise NotImplementedError


@dataclass(frozen=True)
class HiddenPayload(LogitsPayload):
    """What a teacher left for one micro-batch, on the last pipeline stage; filled by `teachers`."""

    hidden: Tensor
    """[n, h] in the teacher's dtype: hidden states after its final norm, one row per response token."""
    logits_of: Callable[[Tensor], Tensor]
    """The teacher's own head: [n, h] to logits [n, v/tp] of this rank's shard, no gradient."""

    @property
    def num_tokens(self) -> int:
        return len(self.hidden)

    def logits(self, rows: slice = ALL_ROWS) -> Tensor:
        return self.logits_of(self.hidden[rows])

    def take(self, tokens: Tensor) -> HiddenPayload:
        return replace(self, hidden=self.hidden[tokens])


@dataclass(frozen=True)
class TopKPayload:
    """A teacher's most likely tokens for one micro-batch; what it gives to all others is one bucket."""

    ids: Tensor
    """[n, k] int64, global token ids; -1 marks an unused slot."""
    log_probs: Tensor
    """[n, k] fp32, nats, at the teacher's temperature; equal on every tensor-parallel rank."""

    def take(self, tokens: Tensor) -> TopKPayload:
        """The payload of these tokens alone, [m] int64 ascending."""
        return TopKPayload(self.ids[tokens], self.log_probs[tokens])


TeacherPayload = LogitsPayload | TopKPayload


@dataclass(frozen=True)
class ModelInput:
    """What a model is given for one micro-batch on this rank, and where its answers are."""

    tokens: Tensor
    """[b, s/cp] int64 (Megatron's embedding transposes); packed sequences are one row, b = 1."""
    position_ids: Tensor
    """[b, s/cp] int64, counted in each sequence."""
    token_rows: Tensor
    """[n] int64: positions in the flattened [s/cp, b] whose logits predict a response token of this rank."""
    packed_seq_params: Any = None
    """Megatron's PackedSeqParams where sequences are packed into one row. Unpacked, padding is on the right, where a
    causal mask hides it: no attention mask is ever needed."""


@dataclass(frozen=True)
class HybridMicrobatch:
    """What Megatron's schedule hands to the forward step; filled by `schedule/microbatch.py`."""

    student: ModelInput
    teacher_input: ModelInput
    """The same object, or the same responses after the prompts that the teacher reads; rows in the same order."""
    sequence_of_token: Tensor
    """[n] int64: which sequence of the micro-batch a response token belongs to."""
    position_of_token: Tensor
    """[n] int64: its position in that sequence, prompt included, whichever rank holds it; ascending."""
    prompts: tuple[Prompt, ...]
    """That of each sequence of the micro-batch: its task, and the recorded response where it has one."""
    targets: Tensor
    """[n] int64: the tokens they predict."""
    weigh: Weigh
    """Credit of these tokens, normalised by nobody yet; imitation alone until `schedule/microbatch.credited`."""
    token_scale: Tensor
    """[n] fp32: share of a token in its sequence's term (1, or 1/length); set by `schedule/normalise.py`."""
    count: Tensor
    """[] int32 (Megatron's type): what Megatron sums over micro-batches and ranks and divides the gradient by."""
    sampled_logprobs: Tensor | None
    """[n] fp32: what the sampler believed, for mismatch metrics; None: nobody knows."""
    teacher: TeacherPayload | None = None

    def take(self, tokens: Tensor) -> HybridMicrobatch:
        """With these of its response tokens [m] int64 ascending; its sequences stay whole, `weigh` and `count` too."""

        def reads(model_input: ModelInput) -> ModelInput:
            return replace(model_input, token_rows=model_input.token_rows[tokens])

        student = reads(self.student)
        return replace(
            self,
            student=student,
            teacher_input=student if self.teacher_input is self.student else reads(self.teacher_input),
            sequence_of_token=self.sequence_of_token[tokens],
            position_of_token=self.position_of_token[tokens],
            targets=self.targets[tokens],
            token_scale=self.token_scale[tokens],
            sampled_logprobs=None if self.sampled_logprobs is None else self.sampled_logprobs[tokens],
            teacher=None if self.teacher is None else self.teacher.take(tokens),
        )


@dataclass(frozen=True)
class TokenNumbers:
    """What the loss said of a micro-batch's response tokens; filled by the forward step. All are detached."""

    kl: Tensor
    """[n] fp32, nats: reverse KL to the teacher; 0 without one."""
    divergence: Tensor
    """[n] fp32, nats: what is minimised in its place."""
    log_prob: Tensor
    """[n] fp32, nats, of the token under the student."""
    teacher_log_prob: Tensor
    """[n] fp32, nats; 0 without a teacher."""
    imitation_weight: Tensor
    """[n] fp32."""
    advantage: Tensor
    """[n] fp32."""


@dataclass(frozen=True)
class PretrainingMicrobatch:
    """A micro-batch of the script's own data beside rollouts; filled by `train/pretraining.py`."""

    batch: tuple[Any, ...]
    """What the script's `get_batch` gave on this stage."""
    scale: Tensor | None
    """[] fp32: factor of its summed cross-entropy, so that Megatron's division by the rollouts' count leaves the
    weighted mean over the step's tokens. None on stages that make no loss."""
