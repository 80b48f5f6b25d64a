"""The function Megatron's schedule calls: the model with our output processor, and the loss it reduces.

On the last stage, per micro-batch:  hidden [s, b, h] -> rows that predict a response token [n, h] -> LM head and op
(`response_loss.py`): loss [n] -> (sum, count, report). Megatron divides the summed gradient by the summed count
(`--calculate-per-token-loss`), which makes the normaliser global.

Collectives: those of the loss; where gradient norms are measured, two more for each chunk of tokens (three with another
divergence); those of the credit under context parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.head_parts import HeadParts, head_parts
from megatron_hybrid.mcore.model import head_logits, model_forward, response_hidden, whole_hidden
from megatron_hybrid.metrics import Metrics
from megatron_hybrid.ops.api import HybridLoss, vocab_parallel_hybrid_loss
from megatron_hybrid.ops.lm_head import linear_hybrid_loss
from megatron_hybrid.records import ALL_ROWS, HybridMicrobatch, PretrainingMicrobatch, TokenNumbers, TopKPayload
from megatron_hybrid.schedule.response_loss import ResponseLoss, Runtime

IGNORED = -100
Output = tuple[Tensor, Callable[..., Any]]


class HybridForwardStep:
    """A drop-in `forward_step_func` for `megatron.training.pretrain`.

    Four kinds of batches, told apart by their type:

    * `HybridMicrobatch`: the hybrid loss. `pretrain_hybrid` feeds these; one's own loop can.
    * `PretrainingMicrobatch`: Megatron's tuple beside them, cross-entropy with a weight and a normaliser of its own.
    * Megatron's tuple (tokens, labels, loss_mask, attention_mask, position_ids) of an existing `get_batch`, hybrid on:
      demonstrations. imitation weight 0 and advantage 1 on every unmasked token, which is Megatron's own cross-entropy,
      computed by the op; or the script's own `base_loss_func` where one is given.
    * the same tuple, hybrid off: exactly the stock step, model with labels and `base_loss_func`.

    Args:
        config: the method; None: `pretrain_hybrid` fills it from `--hybrid-*` arguments, or leaves hybrid off.
        get_batch: `get_batch(data_iterator)` of an existing script; None: `next(data_iterator)`.
        base_loss_func: `base_loss_func(loss_mask, output_tensor)` of an existing script.
        teacher: a teacher for `pretrain_hybrid` to ask (see `teachers/base.py`); None: built from
            `--hybrid-teacher-load`.
    """

    def __init__(
        self,
        config: HybridConfig | None = None,
        *,
        get_batch: Callable[[Iterator[Any]], Any] | None = None,
        base_loss_func: Callable[..., Any] | None = None,
        teacher: Any = None,
    ) -> None:
        self.config = config
        self.get_batch = get_batch or next
        self.base_loss_func = base_loss_func
        self.teacher = teacher
        self.runtime: Runtime | None = None
        self.gradient_norms = False
        """Whether to measure the dense and sparse gradient norms in logits: they are made once more, and read twice."""
        self.metrics = Metrics()
        """Per-token numbers of the micro-batches so far, last stage only; the online loop renews it every step."""
        self.token_numbers: list[TokenNumbers] | None = None
        """Of each micro-batch in order, where somebody asked for them by putting a list here."""
        self.mixed = False
        """Whether the micro-batches of this schedule call are of both kinds: each then reports the losses of both."""

    def __call__(self, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Output:
        batch = self.get_batch(data_iterator)
        if isinstance(batch, HybridMicrobatch):
            return self._hybrid(batch, model, return_schedule_plan)
        if isinstance(batch, PretrainingMicrobatch):
            output, _ = self._demonstration(batch.batch, model, return_schedule_plan)
            return output, partial(_pretraining_loss, batch)
        if self.config is None or self.base_loss_func is not None:
            return self._stock(batch, model.build_schedule_plan if return_schedule_plan else model)
        return self._demonstration(batch, model, return_schedule_plan)

    def _stock(self, batch: Any, forward: Any) -> Output:
        tokens, labels, loss_mask, attention_mask, position_ids = _five(batch)
        if self.base_loss_func is None:
            raise ConfigError(
                "hybrid is off and HybridForwardStep has no base_loss_func, so there is no loss to train on: pass the "
                "script's own loss function as base_loss_func, or turn hybrid on with --hybrid."
            )
        output = forward(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
        return output, partial(self.base_loss_func, loss_mask)

    def _hybrid(self, batch: HybridMicrobatch, model: Any, schedule_plan: bool) -> Output:
        output = model_forward(
            model,
            batch.student.tokens,
            batch.student.position_ids,
            packed_seq_params=batch.student.packed_seq_params,
            output_processor=self._hybrid_output,
            context=batch,
            schedule_plan=schedule_plan,
        )
        return output, partial(_hybrid_loss, batch.count, self.mixed)

    def _hybrid_output(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        scale_logits: Callable[[Tensor], Tensor],
        context: HybridMicrobatch,
        **_: Any,
    ) -> Tensor:
        """An `output_processor`: [s, b, h] to the loss per response token [n], scaled to its share of the count."""
        batch, config = context, self._ready()
        hidden = response_hidden(hidden_states, batch.student.token_rows, output_layer)
        loss, head = ResponseLoss(config, self._known(), batch), None
        if config.lm_head == "fused":
            head = head_parts(output_layer, output_weight, scale_logits)

        def logits_of(rows: slice) -> Tensor:
            return head_logits(hidden[rows], output_layer, output_weight, scale_logits)

        result = loss.from_logits(logits_of(ALL_ROWS)) if head is None else loss.fused(hidden, head)
        weights = loss.used_weights()
        self._measure(batch, result, *weights)
        if self.gradient_norms and not isinstance(batch.teacher, TopKPayload):
            chunk_size = len(hidden) if head is None else loss.chunk_size(head.weight)
            self._measure_gradients(loss, weights, logits_of, chunk_size)
        return result.loss

    @torch.no_grad()
    def _measure_gradients(
        self,
        loss: ResponseLoss,
        weights: tuple[Tensor, Tensor],
        logits_of: Callable[[slice], Tensor],
        chunk_size: int,
    ) -> None:
        """As the loss's own gradient they need all logits: made once more, `chunk_size` tokens at a time."""
        for start in range(0, max(len(loss.batch.targets), 1), max(chunk_size, 1)):
            rows = slice(start, start + chunk_size)
            dense, sparse = loss.gradient_norms(logits_of(rows), rows, *weights)
            self.metrics.mean("actor/grad_norm_dense", dense)
            self.metrics.mean("actor/grad_norm_sparse", sparse)

    def _measure(self, batch: HybridMicrobatch, result: HybridLoss, imitation: Tensor, advantage: Tensor) -> None:
        metrics = self.metrics
        if batch.teacher is not None:  # without one a KL of 0 would read as perfect agreement
            metrics.mean("actor/kl_loss", result.kl)
            if self._ready().divergence != "reverse_kl":
                metrics.mean("actor/distillation/loss", result.divergence)
            metrics.sum("training/infinite_kl_tokens", result.divergence.isinf().float())
        # Selected as in the op: a token that the student forbids may have weight 0.
        metrics.mean("actor/pg_loss", torch.where(advantage == 0, 0.0, -advantage * result.log_prob))
        metrics.mean("actor/entropy", result.entropy)
        metrics.spread("critic/advantages", advantage)
        if (sampled := batch.sampled_logprobs) is not None:
            drift = (sampled.exp() - result.log_prob.exp()).abs()
            drift = torch.where(sampled.isfinite(), drift, 0.0)  # unknown ones are counted by the credit
            metrics.mean("training/rollout_probs_diff_mean", drift)
            metrics.max("training/rollout_probs_diff_max", drift)
        if self.token_numbers is not None:
            self.token_numbers.append(
                TokenNumbers(
                    kl=result.kl,
                    divergence=result.divergence,
                    log_prob=result.log_prob,
                    teacher_log_prob=result.teacher_log_prob,
                    imitation_weight=imitation,
                    advantage=advantage,
                )
            )

    def _demonstration(self, batch: Any, model: Any, schedule_plan: bool) -> Output:
        tokens, labels, loss_mask, attention_mask, position_ids = _five(batch)
        output = model_forward(
            model,
            tokens,
            position_ids,
            attention_mask=attention_mask,
            output_processor=self._demonstration_output,
            context=(labels, loss_mask),
            schedule_plan=schedule_plan,
        )
        return output, partial(_demonstration_loss, loss_mask)

    def _demonstration_output(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, context: Any, **_: Any
    ) -> Tensor:
        """An `output_processor`: cross-entropy per token [b, s], as Megatron's own times the loss mask."""
        labels, loss_mask = context
        config, runtime = self._ready(), self._known()
        target = torch.where(loss_mask > 0, labels, IGNORED).T.contiguous()
        options: dict[str, Any] = {
            "imitation_weight": 0.0,
            "advantage": loss_mask.T.float(),
            "vocab_size": runtime.vocab_size,
            "group": runtime.tp.group,
            "ignore_index": IGNORED,
            "backend": config.backend,
        }
        head = head_parts(output_layer, output_weight, scale_logits) if config.lm_head == "fused" else None
        if head is None:
            logits, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=False)
            logits = scale_logits(logits)
            result = vocab_parallel_hybrid_loss(logits, None, target, inplace=torch.is_grad_enabled(), **options)
        else:
            result = self._fused_cross_entropy(hidden_states, head, target, options)
        return result.loss.T.contiguous()

    def _fused_cross_entropy(
        self, hidden_states: Tensor, head: HeadParts, target: Tensor, options: dict[str, Any]
    ) -> HybridLoss:
        """All positions count: under sequence parallelism the gather's reduce-scatter sums their gradient."""
        hidden = whole_hidden(hidden_states, head.layer, sum_gradient=True)
        return head.run(
            lambda: linear_hybrid_loss(
                hidden,
                head.weight,
                None,
                target,
                one_pass=True,
                chunk_size=self._ready().lm_head_chunk_size,
                logit_scale=head.logit_scale,
                sum_hidden_grad=hidden is hidden_states,
                **options,
            )
        )

    def _ready(self) -> HybridConfig:
        if self.config is None:
            raise AssertionError("a hybrid batch reached a forward step without a HybridConfig")
        return self.config

    def _known(self) -> Runtime:
        if self.runtime is None:
            from megatron_hybrid.mcore.groups import parallel_context
            from megatron_hybrid.mcore.training import true_vocab_size

            self.runtime = Runtime(tp=parallel_context().tp, vocab_size=true_vocab_size())
        return self.runtime


def _five(batch: Any) -> tuple[Any, ...]:
    """What a script's `get_batch` gives; Megatron's own may end in a packed_seq_params of None."""
    given, rest = tuple(batch[:5]), tuple(batch[5:])
    if any(value is not None for value in rest):
        raise ConfigError(
            f"get_batch returned {len(batch)} values, of which tokens, labels, loss_mask, attention_mask and "
            f"position_ids are taken: {', '.join(type(value).__name__ for value in rest)} would be silently dropped, "
            "and packed sequences would read each other. Give sequences that are not packed."
        )
    return given


def _hybrid_loss(count: Tensor, mixed: bool, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's three-tuple: summed loss, what it is divided by in the end, and [sum, count] for its log."""
    loss, count, report = _three(output.sum(), count, "actor/loss")
    if mixed:  # Megatron wants the same names of every micro-batch
        report["pretraining/loss"] = torch.zeros_like(report["actor/loss"])
    return loss, count, report


def _pretraining_loss(batch: PretrainingMicrobatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As above: it counts nothing, its scale holds its own normaliser; its log is the cross-entropy per token."""
    assert batch.scale is not None
    loss_mask = batch.batch[2]
    loss, tokens, report = _demonstration_loss(loss_mask, output)
    named = {"actor/loss": torch.zeros_like(report["lm loss"]), "pretraining/loss": report["lm loss"]}
    return loss * batch.scale, torch.zeros_like(tokens), named


def _demonstration_loss(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return _three(output.sum(), loss_mask.float().sum().int(), "lm loss")  # the mask is in the loss already


def _three(loss: Tensor, count: Tensor, name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # `stack` copies: Megatron divides the loss in place under some settings, the report must not follow.
    return loss, count, {name: torch.stack([loss.detach(), count.to(loss.dtype)])}
