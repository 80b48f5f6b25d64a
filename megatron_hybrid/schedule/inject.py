"""The one place where Megatron is wrapped: its step, schedule call, log line and saves, for the length of a block.

`megatron.training` steps with `train_step`, fetches its schedule with `get_forward_backward_func`, reports a step with
`training_log` and saves with `save_checkpoint_and_time`. Inside `injected(hooks)` these names of that one module lead
through `Hooks`: rollouts and the teacher pass happen before a schedule call, and its micro-batches replace the data
iterator. Calls with any other forward step pass through untouched, and the originals are put back on exit, whatever
happened.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_hybrid.mcore.save_signals import helper_of_the_writer
from megatron_hybrid.mcore.symbols import check_megatron


@dataclass
class ScheduleCall:
    """One call of Megatron's schedule, by keyword, before it happens; hooks may change what it is given."""

    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def forward_only(self) -> bool:
        return bool(self.kwargs.get("forward_only", False))

    @property
    def model(self) -> list[Any]:
        model = self.kwargs["model"]
        return model if isinstance(model, list) else [model]

    def feed(self, batches: list[Any], *, shape: tuple[int, int]) -> None:
        """Every chunk of this rank reads the same micro-batches.

        shape  (micro_batch_size, seq_length) over all context-parallel ranks; under a pipeline all batches have it
        """
        iterators = [iter(batches) for _ in self.model]
        single = not isinstance(self.kwargs["data_iterator"], list) and len(iterators) == 1
        self.kwargs["data_iterator"] = iterators[0] if single else iterators
        self.kwargs["micro_batch_size"], self.kwargs["seq_length"] = shape
        if self.kwargs.get("decoder_seq_length") is not None:
            self.kwargs["decoder_seq_length"] = shape[1]
        self.kwargs["num_microbatches"] = len(batches)


class Hooks(Protocol):
    """What the online loop does around Megatron's own step."""

    forward_step: Any

    def stepping(self, model: list[Any], optimizer: Any) -> AbstractContextManager[None]:
        """What one of Megatron's steps happens in: schedule call and optimizer."""

    def before_schedule(self, call: ScheduleCall) -> None:
        """Collect, and feed the call."""

    def after_schedule(self, call: ScheduleCall) -> None:
        """The schedule is done; gradients are final (training) or untouched (evaluation)."""

    def after_step(self, record: dict[str, Any]) -> None:
        """The optimizer has stepped; `record` holds the arguments of Megatron's `training_log`."""

    def before_save(self, iteration: int) -> None:
        """Megatron is about to write a checkpoint of `iteration` steps."""


@contextlib.contextmanager
def injected(hooks: Hooks) -> Iterator[None]:
    """Routes `megatron.training`'s schedule calls and step log through `hooks`.

    Raises:
        MegatronMismatch: the installed Megatron is not what this file knows; nothing has been changed then.
    """
    check_megatron()
    training: Any = importlib.import_module("megatron.training.training")
    get_schedule, training_log = training.get_forward_backward_func, training.training_log
    train_step, save = training.train_step, training.save_checkpoint_and_time
    log_signature, save_signature = inspect.signature(training_log), inspect.signature(save)
    step_signature = inspect.signature(train_step)

    def get_wrapped_schedule(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return _wrap(get_schedule(*args, **kwargs), hooks)

    def wrapped_step(*args: Any, **kwargs: Any) -> Any:
        given = step_signature.bind(*args, **kwargs).arguments
        with hooks.stepping(given["model"], given["optimizer"]):
            return train_step(*args, **kwargs)

    def wrapped_log(*args: Any, **kwargs: Any) -> Any:
        result = training_log(*args, **kwargs)
        hooks.after_step(dict(log_signature.bind(*args, **kwargs).arguments))
        return result

    def wrapped_save(*args: Any, **kwargs: Any) -> Any:
        hooks.before_save(int(save_signature.bind(*args, **kwargs).arguments["iteration"]))
        with helper_of_the_writer():
            return save(*args, **kwargs)

    training.get_forward_backward_func, training.training_log = get_wrapped_schedule, wrapped_log
    training.train_step, training.save_checkpoint_and_time = wrapped_step, wrapped_save
    try:
        yield
    finally:
        training.get_forward_backward_func, training.training_log = get_schedule, training_log
        training.train_step, training.save_checkpoint_and_time = train_step, save


def _wrap(schedule: Callable[..., Any], hooks: Hooks) -> Callable[..., Any]:
    def call_schedule(**kwargs: Any) -> Any:
        if kwargs.get("forward_step_func") is not hooks.forward_step:
            return schedule(**kwargs)
        call = ScheduleCall(kwargs)
        hooks.before_schedule(call)
        result = schedule(**call.kwargs)
        hooks.after_schedule(call)
        return result

    return call_schedule
