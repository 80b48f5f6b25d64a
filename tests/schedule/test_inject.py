"""Inside the block Megatron's schedule call and step log lead through the hooks; after it, or an error, they do not."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any

import pytest
from megatron.training import training

from megatron_hybrid.errors import MegatronMismatch
from megatron_hybrid.mcore.symbols import SEEN_VERSIONS, asked_of, generation, megatron_version
from megatron_hybrid.schedule.inject import ScheduleCall, injected

NAMES = ("get_forward_backward_func", "training_log", "train_step", "save_checkpoint_and_time")


def originals() -> list[Any]:
    return [getattr(training, name) for name in NAMES]


class Recorder:
    """Hooks that write down what they see."""

    def __init__(self) -> None:
        self.forward_step = object()
        self.seen: list[Any] = []

    @contextlib.contextmanager
    def stepping(self, model: Any, optimizer: Any) -> Iterator[None]:
        self.seen.append(("stepping", model, optimizer))
        yield
        self.seen.append(("stepped",))

    def before_schedule(self, call: ScheduleCall) -> None:
        self.seen.append(("before", dict(call.kwargs)))
        call.feed(["first", "second"], shape=(3, 7))

    def after_schedule(self, call: ScheduleCall) -> None:
        self.seen.append(("after", call.forward_only))

    def after_step(self, record: dict[str, Any]) -> None:
        self.seen.append(("step", record))

    def before_save(self, iteration: int) -> None:
        self.seen.append(("before save", iteration))


@pytest.fixture
def hooks(monkeypatch) -> Recorder:
    """Hooks beside a schedule and a log that only write down how they were called."""
    hooks = Recorder()

    def schedule(**kwargs: Any) -> str:
        hooks.seen.append(("schedule", kwargs))
        return "losses"

    def training_log(loss_dict, learning_rate, iteration, *, skipped_iter, grad_norm) -> str:
        hooks.seen.append(("log", iteration))
        return "memory flag"

    def save_checkpoint_and_time(iteration, model) -> None:
        hooks.seen.append(("save", iteration))

    monkeypatch.setattr(training, "get_forward_backward_func", lambda **kwargs: schedule)

    def train_step(forward_step_func, data_iterator, model, optimizer, iteration=None) -> str:
        hooks.seen.append(("train step", iteration))
        return "losses and more"

    monkeypatch.setattr(training, "training_log", training_log)
    monkeypatch.setattr(training, "train_step", train_step)
    monkeypatch.setattr(training, "save_checkpoint_and_time", save_checkpoint_and_time)
    # The stand-in log has a signature of its own; that the real one fits is what tests/mcore/test_symbols.py checks.
    monkeypatch.setattr("megatron_hybrid.schedule.inject.check_megatron", lambda: None)
    return hooks


def test_a_step_happens_inside_the_hook_that_knows_its_model_and_optimizer(hooks):
    with injected(hooks):
        assert training.train_step(None, None, "model", "optimizer", iteration=3) == "losses and more"
    assert hooks.seen == [("stepping", "model", "optimizer"), ("train step", 3), ("stepped",)]


def test_our_state_is_ready_before_megatron_saves(hooks):
    with injected(hooks):
        training.save_checkpoint_and_time(7, object())
    assert hooks.seen == [("before save", 7), ("save", 7)]


def test_a_helper_that_megatron_starts_while_saving_outlives_the_signal_that_stops_the_job(hooks, monkeypatch):
    helpers, received = [], []

    def save_checkpoint_and_time(iteration, model) -> None:
        helpers.append(get_context("spawn").Manager())  # as Megatron's checkpoint writer does
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "save_checkpoint_and_time", save_checkpoint_and_time)
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with injected(hooks):
            training.save_checkpoint_and_time(7, object())
        until = time.monotonic() + 30  # another thread of this process may take the signal, at its own time
        while not received and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM], "the rank itself hears of it"
    (helper,) = helpers
    os.kill(helper._process.pid, signal.SIGTERM)
    assert helper.list([1])[0] == 1, "it still answers"
    helper.shutdown()


def test_all_names_are_ours_inside_the_block_and_the_originals_after_it():
    before = originals()
    with injected(Recorder()):
        assert not any(now is then for now, then in zip(originals(), before, strict=True))
    assert all(now is then for now, then in zip(originals(), before, strict=True))


def test_the_originals_are_back_after_an_exception():
    before = originals()
    with pytest.raises(KeyError), injected(Recorder()):
        raise KeyError
    assert all(now is then for now, then in zip(originals(), before, strict=True))


def test_a_schedule_call_is_fed_between_the_hooks(hooks):
    data, model = iter(()), object()
    asked = {"forward_step_func": hooks.forward_step, "data_iterator": data, "model": model}
    asked |= {"num_microbatches": 9, "seq_length": 32, "decoder_seq_length": 32, "forward_only": False}
    with injected(hooks):
        assert training.get_forward_backward_func()(**asked) == "losses"
    (before, kwargs), (middle, given), after = hooks.seen
    assert (before, middle, after) == ("before", "schedule", ("after", False))
    assert kwargs == asked
    assert list(given["data_iterator"]) == ["first", "second"]
    assert (given["num_microbatches"], given["seq_length"], given["decoder_seq_length"]) == (2, 7, 7)
    assert given["model"] is model and given["forward_step_func"] is hooks.forward_step


def test_every_chunk_of_an_interleaved_pipeline_reads_the_same_batches():
    call = ScheduleCall({"data_iterator": [iter(()), iter(())], "model": [object(), object()], "forward_only": True})
    call.feed(["first", "second"], shape=(3, 7))
    assert [list(iterator) for iterator in call.kwargs["data_iterator"]] == [["first", "second"]] * 2
    assert call.kwargs.get("decoder_seq_length") is None
    assert call.forward_only


def test_a_list_of_one_chunk_keeps_its_list_of_one_iterator():
    call = ScheduleCall({"data_iterator": [iter(())], "model": [object()]})
    call.feed(["only"], shape=(3, 7))
    (iterator,) = call.kwargs["data_iterator"]
    assert list(iterator) == ["only"]


def test_a_schedule_call_with_another_forward_step_passes_through_untouched(hooks):
    asked = {
        "forward_step_func": lambda data, model: None,
        "data_iterator": iter(()),
        "model": object(),
        "seq_length": 32,
    }
    with injected(hooks):
        assert training.get_forward_backward_func()(**asked) == "losses"
    assert hooks.seen == [("schedule", asked)]


def test_the_step_is_told_after_megatrons_own_log_with_its_arguments_by_name(hooks):
    with injected(hooks):
        assert training.training_log({}, 0.5, 3, skipped_iter=0, grad_norm=2.0) == "memory flag"
    arguments = {"loss_dict": {}, "learning_rate": 0.5, "iteration": 3, "skipped_iter": 0, "grad_norm": 2.0}
    assert hooks.seen == [("log", 3), ("step", arguments)]


def test_after_a_failing_schedule_the_step_is_not_reported_as_done(hooks, monkeypatch):
    def broken(**kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training, "get_forward_backward_func", lambda **kwargs: broken)
    with injected(hooks), pytest.raises(RuntimeError, match="out of memory"):
        training.get_forward_backward_func()(
            forward_step_func=hooks.forward_step, data_iterator=iter(()), model=object(), seq_length=32
        )
    assert [name for name, _ in hooks.seen] == ["before"]


@pytest.mark.parametrize(
    "name", [name for module, name in asked_of(generation()) if module == "megatron.training.training"]
)
def test_a_megatron_without_a_borrowed_symbol_is_named_and_left_alone(monkeypatch, name):
    monkeypatch.delattr(training, name)
    before = [vars(training).get(n) for n in NAMES]
    expected = (
        f"megatron-core {megatron_version()} has no megatron.training.training.{name} .*seen to work.*{SEEN_VERSIONS}"
    )
    with pytest.raises(MegatronMismatch, match=expected), injected(Recorder()):
        raise AssertionError("the block must not be entered")
    assert [vars(training).get(n) for n in NAMES] == before
