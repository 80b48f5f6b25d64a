"""What can be known of an online run before Megatron starts: settings, prompts, tokenizer and teachers, held against
each other. Nothing is built, and nothing written but the empty run folder.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_hybrid.checkpoint.hf_config import megatron_args_to_hf_config
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.online_config import EXECUTES_CODE, OnlineConfig
from megatron_hybrid.prompts.question import LeftOut
from megatron_hybrid.prompts.sources import open_sources
from megatron_hybrid.prompts.stream import PromptStream, too_long
from megatron_hybrid.prompts.template import PromptTemplate
from megatron_hybrid.prompts.tokenizers import READABLE, SENTENCEPIECE, read_tokenizer
from megatron_hybrid.rewards.build import build_rubric
from megatron_hybrid.rewards.rubric import Rubric
from megatron_hybrid.teachers.spec import SELF, TeacherSpec, parse_teachers
from megatron_hybrid.teachers.store import TeacherStore
from megatron_hybrid.train import journal
from megatron_hybrid.train.peers import collective_timeout_s
from megatron_hybrid.train.recorded import open_rollouts, open_teacher_store

logger = logging.getLogger(__name__)

LEAST_FREE_BYTES = 1 << 20
"""Of the run folder's disk: a few hundred steps."""


@dataclass(frozen=True)
class Prepared:
    """What can be known before Megatron starts."""

    config: HybridConfig
    online: OnlineConfig
    tokenizer: Any
    prompts: PromptStream
    eval_prompts: PromptStream
    rubric: Rubric
    tasks: tuple[str, ...]
    teachers: TeacherSpec | None
    teacher_args: dict[str, dict[str, Any]]
    """Arguments stored in each teacher's checkpoint, by its path."""
    teacher_store: TeacherStore | None
    left_out: tuple[LeftOut, ...]
    """What files hold and the run does not use, for its config.json."""


def prepare(args: Namespace, config: HybridConfig, online: OnlineConfig, *, has_teacher: bool = False) -> Prepared:
    """Opens prompts, tokenizer and the teachers' arguments, and holds them against each other.

    has_teacher  the forward step brings a teacher of its own

    Raises:
        ConfigError, DataError: see the messages; nothing has been built or written.
    """
    _check_launcher()
    _check_job(args)
    _check_batches(args, config)
    _check_teacher_settings(args, config, online, has_teacher)
    _check_waits(args, online)
    if online.nonfinite_steps and args.optimizer_cuda_graph:
        raise ConfigError(
            f"nonfinite_steps is {online.nonfinite_steps}, but under --optimizer-cuda-graph the optimizer's step is "
            "replayed as it was captured: it cannot be skipped. Set --hybrid-nonfinite-steps 0, or leave the graph out."
        )
    room = args.seq_length - online.max_response_length
    if room < 1:
        raise ConfigError(
            f"--seq-length {args.seq_length} leaves no room to answer: responses may have "
            f"{online.max_response_length} tokens (--hybrid-max-response-length), which leaves {room} for the prompt. "
            "Raise one or lower the other."
        )
    teachers = None if online.teacher_load is None else parse_teachers(online.teacher_load)
    tokenizer = _load_tokenizer(args)
    if config.teacher_payload == "topk" and config.teacher_topk > len(tokenizer):
        raise ConfigError(
            f"teacher_topk is {config.teacher_topk}, but the tokenizer has {len(tokenizer)} tokens: there are no more "
            "to choose. Lower --hybrid-teacher-topk, or use --hybrid-teacher-payload hidden for all of them."
        )
    paths = [path for path in teachers.sources if path != SELF] if teachers else []
    teacher_args = {path: _teacher_args(path, tokenizer, args) for path in paths}

    limit = _longest_prompt(online, room)
    template = PromptTemplate(tokenizer, system_prompt=online.system_prompt, teacher_hint=online.teacher_hint)
    num_eval = int(args.eval_iters) * int(getattr(args, "eval_global_batch_size", None) or args.global_batch_size)
    training, held_out = open_sources(
        open_rollouts(config, online, tokenizer) or online.prompts or "",
        online.eval_prompts,
        seed=args.seed,
        num_eval=num_eval,
        refuse=too_long(template, limit) if online.long_prompts == "drop" else None,
        on_bad_record=online.on_bad_record,
    )
    left_out = training.left_out + (() if held_out is None else held_out.left_out)
    if held_out is None:
        if num_eval:
            raise ConfigError(
                f"--eval-iters is {args.eval_iters}, but nothing is held out of {online.prompts or online.rollouts}: "
                "give --hybrid-eval-prompts another file, or set --eval-iters 0."
            )
        held_out = training
    streams = [PromptStream(s, template, seed=args.seed, max_prompt_length=limit) for s in (training, held_out)]
    tasks = training.tasks | held_out.tasks
    if teachers is not None:
        teachers.check_tasks(tasks)
    store = open_teacher_store(config, online, tokenizer, streams[0])
    rubric = build_rubric(online)
    _open_run_dir(online.run_dir, writes=args.rank == args.world_size - 1)  # the first thing that is written
    return Prepared(
        config=config,
        online=online,
        tokenizer=tokenizer,
        prompts=streams[0],
        eval_prompts=streams[1],
        rubric=rubric,
        tasks=tuple(sorted(tasks)),
        teachers=teachers,
        teacher_args=teacher_args,
        teacher_store=store,
        left_out=left_out,
    )


def _longest_prompt(online: OnlineConfig, room: int) -> int:
    """Tokens a prompt may have; `room` is what the sequence length leaves."""
    if online.max_prompt_length is not None and online.max_prompt_length > room:
        raise ConfigError(
            f"max_prompt_length is {online.max_prompt_length}, but --seq-length leaves {room} tokens beside a "
            "response: longer prompts could not be answered. Raise --seq-length, or lower one of the two."
        )
    return online.max_prompt_length or room


def _check_launcher() -> None:
    """Ranks that torchrun starts again can find each other."""
    launcher = os.environ
    if int(launcher.get("TORCHELASTIC_MAX_RESTARTS", 0)) and launcher.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            "torchrun is to restart ranks that die (--max-restarts), but on a store that still holds the addresses of "
            "those before them: the restart would end in refused connections (seen with torch 2.14). Start torchrun "
            "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment."
        )


def _check_job(args: Namespace) -> None:
    """Megatron's settings that a plain run may leave at their defaults."""
    if args.transformer_impl == "transformer_engine" and not importlib.util.find_spec("transformer_engine"):
        raise ConfigError(
            "--transformer-impl is transformer_engine (Megatron's default), but the package transformer_engine is not "
            "installed: no layer could be built. Install it (pip install 'transformer-engine[pytorch]', for a GPU), or "
            "use --transformer-impl local."
        )
    if args.eval_interval is None:
        raise ConfigError(
            "--eval-interval is not set, and Megatron divides by it, also where --eval-iters is 0: give it."
        )
    if args.attention_dropout or args.hidden_dropout:
        raise ConfigError(
            f"--attention-dropout is {args.attention_dropout} and --hidden-dropout {args.hidden_dropout}: responses "
            "are sampled without dropout and would be learnt from with it, as if another policy had written them. Set "
            "both to 0 (Megatron's default is 0.1)."
        )


def _check_batches(args: Namespace, config: HybridConfig) -> None:
    """Groups and collections of rollouts fit into Megatron's batches."""
    per_replica = args.global_batch_size // args.data_parallel_size
    if per_replica % config.group_size:
        raise ConfigError(
            f"--global-batch-size {args.global_batch_size} over {args.data_parallel_size} data-parallel replicas is "
            f"{per_replica} responses each, which is no multiple of group_size {config.group_size}: a group must not "
            "be split. Change one of the three."
        )
    if config.has_future_cost and config.cost_baseline == "group" and args.micro_batch_size % config.group_size:
        raise ConfigError(
            f"cost_baseline 'group' compares the responses to one prompt at the same position, for which a micro-batch "
            f"must hold whole groups: --micro-batch-size is {args.micro_batch_size}, group_size {config.group_size}. "
            "Use a multiple of group_size, or --hybrid-cost-baseline none."
        )
    if config.baseline == "reinforce_plus_plus" and args.global_batch_size * config.mini_batches < 2:
        raise ConfigError(
            "baseline 'reinforce_plus_plus' compares the responses of a collection, and --global-batch-size 1 makes "
            "one at a time: it has nobody to be compared with. Raise it, or use baseline 'running_mean'."
        )


def _check_teacher_settings(args: Namespace, config: HybridConfig, online: OnlineConfig, has_teacher: bool) -> None:
    """Whoever is to be imitated is there, once, and can read what it is to read."""
    if has_teacher and online.names_teacher:
        ((given, value),) = online.named_teachers.items()
        raise ConfigError(
            f"HybridForwardStep has a teacher of its own, and {given} is {value!r}: one of the two would be silently "
            "ignored. Leave one out."
        )
    if config.imitates and not online.names_teacher and not has_teacher:
        raise ConfigError(
            f"imitation_weight is {config.imitation_weight}, but there is no teacher to imitate: give "
            "--hybrid-teacher-load, --hybrid-teacher-server or --hybrid-teacher-store, or set "
            "--hybrid-imitation-weight 0 for reward alone."
        )
    _check_engines(args, config, online)
    if online.teacher_hint is None:
        return
    if not online.names_teacher and not has_teacher:
        raise ConfigError(
            "teacher_hint is what a teacher reads behind the question, but there is no teacher: give "
            "--hybrid-teacher-load ('self' for a copy of the student), or leave the hint out."
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"the teacher reads a hint that the student does not, and --context-parallel-size is "
            f"{args.context_parallel_size}: a response token would lie on one rank for the student and on another for "
            "the teacher. Use --context-parallel-size 1, or no --hybrid-teacher-hint."
        )


def _check_engines(args: Namespace, config: HybridConfig, online: OnlineConfig) -> None:
    """What an inference engine's server can do: k log-probs a token, of the model itself, for whole sequences."""
    if online.rollout_server is not None and config.student_temperature != 1:
        raise ConfigError(
            f"student_temperature is {config.student_temperature}, and {online.rollout_server} samples: the log-probs "
            "that a server gives are those of temperature 1, and importance weights would be of another distribution. "
            "Use temperature 1, or the student's own decoding."
        )
    if online.rollout_sync_interval is not None:
        _check_export(args, online.rollout_sync_interval)
    if online.teacher_server is None:
        return
    if config.teacher_payload != "topk":
        raise ConfigError(
            f"teacher_payload is {config.teacher_payload!r}, but a server gives its likeliest tokens alone: set "
            "--hybrid-teacher-payload topk, and --hybrid-teacher-topk to what it allows (vLLM: --max-logprobs, 20 by "
            "default)."
        )
    if config.teacher_temperature != 1:
        raise ConfigError(
            f"teacher_temperature is {config.teacher_temperature}, but a server gives log-probs of temperature 1, and "
            "those of a few tokens cannot be tempered: what all others sum to is unknown. Use temperature 1."
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"--context-parallel-size is {args.context_parallel_size}, but a teacher on a server is asked for whole "
            "sequences, of which a rank then holds parts. Use 1, or --hybrid-teacher-load."
        )


def _check_waits(args: Namespace, online: OnlineConfig) -> None:
    """One rank asks a server; the others wait in a collective, which has a timeout of its own."""
    longest_s, after_start_s = online.longest_request_s, args.distributed_timeout_seconds_after_init
    if args.world_size > 1 and longest_s >= collective_timeout_s(args):
        waits = f"--distributed-timeout-minutes {args.distributed_timeout_minutes}", int(longest_s // 60) + 1
        if after_start_s is not None:
            waits = f"--distributed-timeout-seconds-after-init {after_start_s}", int(longest_s) + 1
        raise ConfigError(
            f"a request to a server may take {longest_s:g} s in all (server_timeout {online.server_timeout:g}, "
            f"server_retries {online.server_retries}), but the other ranks wait {waits[0]} for it: a slow server would "
            f"end the run as a collective that hangs. Set it to {waits[1]} or more, or lower "
            "--hybrid-server-timeout or --hybrid-server-retries."
        )
    limited = any(online.workers_of(name) or name == EXECUTES_CODE for _, name in online.rewards)
    if args.world_size > 1 and limited and online.reward_timeout >= collective_timeout_s(args):
        raise ConfigError(
            f"reward_timeout is {online.reward_timeout:g} s, but the other ranks wait {collective_timeout_s(args):g} s "
            "for all rewards: one that hangs would end the run as a collective that hangs. Lower it, or raise "
            "--distributed-timeout-minutes."
        )


def _check_export(args: Namespace, interval: int) -> None:
    """The student can be handed to a rollout server, which reads Hugging Face folders."""
    if args.tokenizer_type in SENTENCEPIECE:
        raise ConfigError(
            f"rollout_sync_interval is {interval} and --tokenizer-type {args.tokenizer_type}: a rollout server is "
            "given the student as a Hugging Face folder, tokenizer included, and this is none of Hugging Face's. Use "
            "--tokenizer-type HuggingFaceTokenizer, or no --hybrid-rollout-server."
        )
    try:
        megatron_args_to_hf_config(vars(args))
    except DataError as error:
        raise ConfigError(
            f"rollout_sync_interval is {interval}, but the student cannot be given to a rollout server as a Hugging "
            f"Face folder: {error} Leave --hybrid-rollout-server and its interval out, or train such a model."
        ) from error


def _load_tokenizer(args: Namespace) -> Any:
    if args.tokenizer_type not in READABLE:
        raise ConfigError(
            f"--tokenizer-type is {args.tokenizer_type}: online prompts need a tokenizer's own words and "
            "end-of-sequence token, which come with --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER, or "
            "SentencePieceTokenizer and a .model file."
        )
    if args.tokenizer_type in SENTENCEPIECE and (args.tokenizer_sentencepiece_legacy or args.special_tokens):
        raise ConfigError(
            "--tokenizer-sentencepiece-legacy and --tokenizer-special-tokens add tokens that the sentencepiece model "
            "does not have, and prompts would be read without them. Leave both out, and train the tokenizer with them "
            "(tools/train_tokenizer.py --symbols)."
        )
    tokenizer = read_tokenizer(args.tokenizer_type, args.tokenizer_model)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {args.tokenizer_model} has no end-of-sequence token: a response could never end. Set "
            "eos_token in its tokenizer_config.json; a sentencepiece model is trained with one unless told otherwise."
        )
    return tokenizer


def _open_run_dir(folder: str, *, writes: bool) -> None:
    """A folder that cannot be written, or whose journal is broken, must not be found out after the model is built.

    writes  this rank is the one that will: the others may have a disk of their own
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if writes:
            with tempfile.TemporaryFile(dir=path) as probe:
                probe.write(bytes(LEAST_FREE_BYTES))
            for name in ("metrics.jsonl", "samples.jsonl", "infinite_kl.jsonl"):
                if (path / name).exists():
                    open(path / name, "ab").close()
        for name in ("metrics.jsonl", "infinite_kl.jsonl"):
            journal.read(path / name)
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder!r} cannot be written: {error}. Metrics and samples of the run would be lost from "
            "its first step on. Free the disk or change its permissions, or give another --hybrid-run-dir."
        ) from error


def _teacher_args(checkpoint: str, tokenizer: Any, args: Namespace) -> dict[str, Any]:
    """The teacher's stored arguments, once it is known to fit the job and that its token ids are the student's."""
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_args
    from megatron_hybrid.mcore.second_model import frozen_args

    stored = load_megatron_args(checkpoint)
    theirs = stored.get("hybrid_tokenizer_fingerprint")
    if theirs is None and stored.get("tokenizer_type") in READABLE:
        theirs = tokenizer_fingerprint(read_tokenizer(stored["tokenizer_type"], stored["tokenizer_model"]))
    if theirs is not None and theirs != tokenizer_fingerprint(tokenizer):
        raise DataError(
            f"the teacher in {checkpoint} was made with another tokenizer ({stored.get('tokenizer_model')}): the same "
            "id means different tokens, so imitation would teach noise. Use a teacher with the student's tokenizer."
        )
    rows = stored.get("vocab_size")
    # A head may have more rows than the tokenizer has tokens; that they mean the same is known from the fingerprint.
    if rows is not None and (rows < len(tokenizer) or (rows > len(tokenizer) and theirs is None)):
        raise DataError(
            f"the teacher in {checkpoint} has a vocabulary of {rows} tokens, the student's tokenizer {len(tokenizer)}: "
            "their distributions cannot be compared token by token. Use a teacher with the student's tokenizer."
        )
    if theirs is None:
        logger.warning(
            "the teacher in %s names no tokenizer that can be read (type %s): that its token ids mean what the "
            "student's mean is taken on trust",
            checkpoint,
            stored.get("tokenizer_type"),
        )
    frozen_args(args, stored)
    return stored
