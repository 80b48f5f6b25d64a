"""`pretrain_hybrid`: `megatron.training.pretrain` with the online step around its schedule call.

Takes whatever the installed `pretrain` takes, in its own order, and finds the forward step and the dataset provider in
it by name. Without `--hybrid` the call goes straight through. With it, everything that can be wrong with the settings,
the prompts and the teacher is found out before Megatron builds a model (`prepare`); the stages that need Megatron's
process groups are made when it asks for its data, which is after the model and before the first step (`_build_loop`).
"""

from __future__ import annotations

import inspect
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_hybrid.checkpoint.latest import settle
from megatron_hybrid.config import HybridConfig, as_dict
from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.mcore.symbols import borrow, check_megatron
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.schedule.forward_step import HybridForwardStep
from megatron_hybrid.schedule.inject import injected
from megatron_hybrid.schedule.layout import SequenceLayout
from megatron_hybrid.schedule.response_loss import Runtime
from megatron_hybrid.teachers.base import Teacher
from megatron_hybrid.teachers.spec import SELF
from megatron_hybrid.train.failed_samples import FailedSamples
from megatron_hybrid.train.loop import OnlineLoop, Teachers
from megatron_hybrid.train.nonfinite import NonFiniteSteps
from megatron_hybrid.train.peers import Peers, collective_timeout_s
from megatron_hybrid.train.prepare import Prepared, prepare
from megatron_hybrid.train.pretraining import ScriptData
from megatron_hybrid.train.report import RunReport

if TYPE_CHECKING:
    from megatron_hybrid.rollouts.generate import Sampler
    from megatron_hybrid.rollouts.recorded import RecordedSampler
    from megatron_hybrid.rollouts.remote import RemoteSampler
    from megatron_hybrid.train.weight_sync import WeightSync

logger = logging.getLogger(__name__)


def pretrain_hybrid(*args: Any, **kwargs: Any) -> Any:
    """A drop-in around `megatron.training.pretrain`, whatever the signature of the installed version.

    The forward step must be a `HybridForwardStep`, and the command line be parsed with `add_hybrid_args`: by the script
    before the call, or by a `pretrain` that takes it as `extra_args_provider`. With `--hybrid --hybrid-prompts ...`
    training is online, with `--hybrid-rollouts FILE` on what the file holds: the dataset provider passed in is asked
    for `--hybrid-pretraining-microbatches` only. With `--hybrid` alone the script's own data is trained by its
    `base_loss_func`, or through the hybrid op where it has none. Without `--hybrid` this is `pretrain` itself.

    Raises:
        ConfigError, DataError: settings, prompts or teacher are unusable; no model has been built then.
        MegatronMismatch: the installed Megatron lacks something that is borrowed; names it.
        PeerError: another rank died or hangs, and the collectives of this one broke off; names it and its stage.
    """
    pretrain = borrow("megatron.training.training", "pretrain")
    from megatron_hybrid.mcore.plain_reading import plain_data_only
    from megatron_hybrid.mcore.training import started

    call = inspect.signature(pretrain).bind(*args, **kwargs)
    with ExitStack() as stack:
        with plain_data_only():  # 0.17 parses here, --use-checkpoint-args too
            arguments = stack.enter_context(started(call))
        if not getattr(arguments, "hybrid", False):
            return pretrain(*args, **kwargs)
        check_megatron()
        return _pretrain(pretrain, call, arguments)


def _pretrain(pretrain: Callable[..., Any], call: inspect.BoundArguments, arguments: Namespace) -> Any:
    """`pretrain` called as it was to be, with the hybrid step in it."""
    forward_step = call.arguments.get("forward_step_func")
    if not isinstance(forward_step, HybridForwardStep):
        raise ConfigError(
            f"--hybrid is on, but forward_step_func is {type(forward_step).__name__}: the hybrid loss lives in "
            "HybridForwardStep. Pass HybridForwardStep(get_batch=..., base_loss_func=...) instead of the function."
        )
    from megatron_hybrid.mcore.plain_reading import plain_data_only
    from megatron_hybrid.mcore.training import refuse_unsupported

    refuse_unsupported(arguments)
    from_flags = HybridConfig.from_args(arguments)
    if forward_step.config not in (None, from_flags):
        raise ConfigError(
            "HybridForwardStep was given a config that differs from the --hybrid-* flags: one of the two would be "
            "silently ignored. Leave config out where flags are used."
        )
    forward_step.config = from_flags
    online = OnlineConfig.from_args(arguments)
    if not online.has_rollouts:
        if online.names_teacher or forward_step.teacher is not None:
            raise ConfigError(
                "there is a teacher, but no --hybrid-prompts or --hybrid-rollouts: without either the script's own "
                "data is trained on, and the teacher would be silently ignored. Give one of them, or leave the teacher "
                "out."
            )
        if from_flags.pretraining_microbatches:
            raise ConfigError(
                f"pretraining_microbatches is {from_flags.pretraining_microbatches}, but there are no rollouts to go "
                "beside: the script's own data is all that is trained on. Give --hybrid-prompts or --hybrid-rollouts, "
                "or leave it at 0."
            )
        with plain_data_only():
            return pretrain(*call.args, **call.kwargs)

    script = ScriptData(
        call.arguments.get("train_valid_test_dataset_provider"), forward_step.get_batch, arguments.dataloader_type
    )
    script.check(arguments, from_flags, packed=online.pack_sequences)
    # A checkpoint of torch_dcp has no mark by which a whole one is known.
    if arguments.load is not None and arguments.ckpt_step is None and arguments.ckpt_format != "torch_dcp":
        settle(arguments.load, writes=arguments.rank == 0)
    prepared = prepare(arguments, forward_step.config, online, has_teacher=forward_step.teacher is not None)
    with ExitStack() as stack:
        stack.enter_context(plain_data_only())  # Megatron's own --load too
        # Iterators are handed over as they are, and of micro-batches that the script's own get_batch does not know.
        stack.enter_context(_replaced(arguments, "dataloader_type", "external"))
        stack.enter_context(_replaced(forward_step, "get_batch", next))
        provider = _provider(stack, prepared, arguments, forward_step, script)
        call.arguments["train_valid_test_dataset_provider"] = provider
        try:
            result = pretrain(*call.args, **call.kwargs)
        except SystemExit:  # how Megatron stops at --exit-interval, --exit-duration-in-mins and on signals
            provider.finish()
            raise
        except BaseException as error:
            provider.failed(error)
            raise
        provider.finish()
    return result


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Provider:
    """What Megatron calls a dataset provider: asked once per model chunk, after the model is built."""

    is_distributed = True
    """Megatron asks every rank, not only the first of each tensor-parallel group."""

    def __init__(self, build: Callable[[Sequence[int]], OnlineLoop]) -> None:
        self._build = build
        self._loop: OnlineLoop | None = None

    def __call__(self, num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        if self._loop is None:
            self._loop = self._build(num_samples)
        # The schedule is fed by the loop; these stand for data that exists.
        return iter(()), iter(()), None

    def failed(self, error: BaseException) -> None:
        """Tells the other ranks, and raises PeerError where one of them is the cause."""
        if self._loop is not None and (cause := self._loop.peers.failed(error)) is not None:
            raise cause from error

    def finish(self) -> None:
        """The before/after table and the plots, on the logging rank."""
        if self._loop is not None and self._loop.report is not None:
            self._loop.report.finish()


def _provider(
    stack: ExitStack, prepared: Prepared, args: Namespace, forward_step: HybridForwardStep, script: ScriptData
) -> _Provider:
    def build(num_samples: Sequence[int]) -> OnlineLoop:
        loop = _build_loop(prepared, args, forward_step, script, num_samples)
        if loop.report is not None:
            stack.callback(loop.report.close)
        stack.enter_context(injected(loop))
        return loop

    return _Provider(build)


def _build_loop(
    prepared: Prepared,
    args: Namespace,
    forward_step: HybridForwardStep,
    script: ScriptData,
    num_samples: Sequence[int],
) -> OnlineLoop:
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.train.identity import identify

    config, online, tokenizer = prepared.config, prepared.online, prepared.tokenizer
    parallel = parallel_context()
    layout = SequenceLayout.of(parallel, sequence_parallel=args.sequence_parallel, packed=online.pack_sequences)
    if config.pretraining_microbatches and layout.same_width:
        layout = replace(layout, least_width=args.seq_length)  # that of the script's own batches
    saved = _saved_args(args)
    args.hybrid_identity = identify(prepared, args, own_teacher=forward_step.teacher is not None, saved=saved)
    failed_samples = FailedSamples(online, parallel)
    sampler, eval_sampler, weight_sync = _build_samplers(prepared, parallel, failed_samples)
    forward_step.runtime = Runtime(tp=parallel.tp, vocab_size=len(tokenizer))
    report = _open_report(prepared, args)
    nonfinite = NonFiniteSteps(
        online.nonfinite_steps, online.run_dir, parallel, fresh=args.iteration == 0, says=report is not None
    )
    nonfinite.load(saved.get("hybrid_nonfinite") or ())
    return OnlineLoop(
        args=args,
        config=config,
        forward_step=forward_step,
        parallel=parallel,
        layout=layout,
        prompts=prepared.prompts,
        eval_prompts=prepared.eval_prompts,
        sampler=sampler,
        eval_sampler=eval_sampler,
        pretraining=script.open(num_samples, args, config, parallel),
        weight_sync=weight_sync,
        rubric=prepared.rubric,
        failed_samples=failed_samples,
        build_teachers=lambda student: _build_teachers(prepared, forward_step, parallel, student),
        tasks=prepared.tasks,
        saved_state=dict(saved.get("hybrid_state") or {}),
        report=report,
        samples_interval=online.samples_interval,
        gradient_norms_interval=online.gradient_norms_interval,
        peers=Peers(timeout_s=collective_timeout_s(args), by_itself=dist.get_backend() != "gloo"),
        nonfinite=nonfinite,
    )


def _build_samplers(
    prepared: Prepared, parallel: ParallelContext, failed_samples: FailedSamples
) -> tuple[Sampler | RecordedSampler | RemoteSampler, Sampler | RemoteSampler, WeightSync | None]:
    """Who samples for training and for evaluation, and what keeps their weights fresh where they are on a server."""
    from megatron_hybrid.rollouts.generate import Sampler
    from megatron_hybrid.rollouts.recorded import RecordedSampler
    from megatron_hybrid.rollouts.remote import RemoteSampler
    from megatron_hybrid.servers.build import build_engine
    from megatron_hybrid.train.weight_sync import WeightSync, weights_folder

    online, tokenizer = prepared.online, prepared.tokenizer
    common: dict[str, Any] = {
        "parallel": parallel,
        "device": torch.device(torch.cuda.current_device()),  # Megatron's own idiom; the CPU runtime answers it too
        "vocab_size": len(tokenizer),
        "stop_ids": frozenset({tokenizer.eos_token_id}),
        "decode": lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        "max_response_length": online.max_response_length,
    }
    own = Sampler(**common, temperature=prepared.config.student_temperature, batch_size=online.rollout_batch_size)
    if online.rollout_server is None:
        return own if online.rollouts is None else RecordedSampler(own.decode, own.device), own, None
    engine = build_engine(online.rollout_server, "the rollout server", online)
    remote = RemoteSampler(engine, **common, on_failed=failed_samples.rollouts_failed)
    if online.rollout_sync_interval is None:
        return remote, own, None  # the server's model never changes: held-out numbers are to be the student's
    folder = weights_folder(online.run_dir, online.rollout_sync_dir)
    sync = WeightSync(engine, interval=online.rollout_sync_interval, folder=folder, tokenizer=tokenizer.name_or_path)
    return remote, remote, sync


def _build_teachers(
    prepared: Prepared, forward_step: HybridForwardStep, parallel: ParallelContext, student: list[torch.nn.Module]
) -> Teachers:
    """The run's teacher, and the part of it that is a copy of the student."""
    from megatron_hybrid.servers.build import build_engine
    from megatron_hybrid.teachers.build import build_teacher
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from megatron_hybrid.teachers.remote import RemoteTeacher
    from megatron_hybrid.teachers.snapshot import SnapshotTeacher
    from megatron_hybrid.teachers.store import StoredTeacher
    from megatron_hybrid.teachers.topk import TopKTeacher

    config, online = prepared.config, prepared.online
    vocab_size = len(prepared.tokenizer)
    if prepared.teacher_store is not None:
        return Teachers(StoredTeacher(prepared.teacher_store, is_last_stage=parallel.is_last_stage), None)
    if online.teacher_server is not None:
        engine = build_engine(online.teacher_server, "the teacher server", online)
        return Teachers(RemoteTeacher(engine, config.teacher_topk, vocab_size, parallel), None)
    copies: list[SnapshotTeacher] = []

    def load(source: str) -> Teacher:
        if source != SELF:
            return FrozenTeacher.load(source, prepared.teacher_args[source], parallel)
        copies.append(
            SnapshotTeacher(
                student, parallel, decay=online.teacher_ema_decay, refresh_interval=online.teacher_refresh_interval
            )
        )
        return copies[0]

    teacher: Teacher | None = forward_step.teacher
    if teacher is None and prepared.teachers is not None:
        teacher = build_teacher(
            prepared.teachers, load, vocab_size=vocab_size, temperature=config.teacher_temperature, tp=parallel.tp
        )
    if teacher is not None and config.teacher_payload == "topk":
        teacher = TopKTeacher(teacher, config.teacher_topk, vocab_size, config.teacher_temperature, parallel.tp)
    return Teachers(teacher, copies[0] if copies else None)


def _saved_args(args: Namespace) -> dict[str, Any]:
    """The arguments in the checkpoint that Megatron has resumed from; empty at a fresh start."""
    if args.iteration == 0:
        return {}
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_args

    try:
        return load_megatron_args(Path(args.load) / f"iter_{args.iteration:07d}")
    except DataError as error:  # of another format, or elsewhere: what Megatron could read all the same
        logger.warning("what the checkpoint remembers besides weights cannot be read: %s", error)
        return {}


def _open_report(prepared: Prepared, args: Namespace) -> RunReport | None:
    """The report of the rank where Megatron keeps its own writers: the last."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return None
    from megatron_hybrid.mcore.training import get_tensorboard_writer, get_wandb_writer

    report = RunReport(
        prepared.online.run_dir,
        total_steps=args.train_iters,
        tensorboard=get_tensorboard_writer(),
        wandb=get_wandb_writer(),
        start_step=args.iteration,
    )
    report.guard_wandb_caller(borrow("megatron.training.wandb_utils", "on_save_checkpoint_success"))
    resolved: dict[str, Any] = {
        "hybrid": as_dict(prepared.config),
        "online": as_dict(prepared.online),
        "tasks": list(prepared.tasks),
    }
    resolved |= {"left_out": [as_dict(each) for each in prepared.left_out]}
    report.config({**resolved, "megatron": {name: value for name, value in sorted(vars(args).items())}})
    return report
