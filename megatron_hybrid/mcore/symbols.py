"""Every symbol the package borrows from Megatron, by name, so that a version that lacks one is told apart at once.

`check_megatron()` looks at all of them before a model is built. README.md in this folder lists them with the reason for
each.
"""

import importlib
import importlib.util
import inspect
from importlib.machinery import PathFinder
from typing import Any

from megatron_hybrid.errors import ConfigError, MegatronMismatch

SEEN_VERSIONS = "0.19.2"
ALSO_SEEN = ("0.18.2", "0.17.1")

BORROWED: tuple[tuple[str, str], ...] = (
    ("megatron.core.dist_checkpointing", "check_is_distributed_checkpoint"),
    ("megatron.core.dist_checkpointing", "load"),
    ("megatron.core.dist_checkpointing", "load_common_state_dict"),
    ("megatron.core.dist_checkpointing", "load_tensors_metadata"),
    ("megatron.core.dist_checkpointing", "save"),
    ("megatron.core.dist_checkpointing.strategies.filesystem_async", "_results_queue"),
    ("megatron.core.distributed", "DistributedDataParallel"),
    ("megatron.core.enums", "ModelType"),
    ("megatron.core.inference.contexts", "StaticInferenceContext"),
    ("megatron.core.models.gpt", "GPTModel"),
    ("megatron.core.models.gpt.gpt_layer_specs", "get_gpt_decoder_block_spec"),
    ("megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"),
    ("megatron.core.models.hybrid.hybrid_model", "HybridModel"),
    ("megatron.core.optimizer", "Adam"),
    ("megatron.core.optimizer", "ChainedOptimizer"),
    ("megatron.core.packed_seq_params", "PackedSeqParams"),
    ("megatron.core.parallel_state", "destroy_model_parallel"),
    ("megatron.core.parallel_state", "get_context_parallel_group"),
    ("megatron.core.parallel_state", "get_data_parallel_group"),
    ("megatron.core.parallel_state", "get_pipeline_model_parallel_group"),
    ("megatron.core.parallel_state", "get_tensor_model_parallel_group"),
    ("megatron.core.parallel_state", "initialize_model_parallel"),
    ("megatron.core.pipeline_parallel", "get_forward_backward_func"),
    ("megatron.core.process_groups_config", "ProcessGroupCollection"),
    ("megatron.core.tensor_parallel", "ColumnParallelLinear"),
    ("megatron.core.tensor_parallel", "gather_from_sequence_parallel_region"),
    ("megatron.core.tensor_parallel.random", "model_parallel_cuda_manual_seed"),
    ("megatron.core.transformer", "TransformerConfig"),
    ("megatron.core.transformer.attention", "Attention"),
    ("megatron.core.transformer.dot_product_attention", "DotProductAttention"),
    ("megatron.core.utils", "get_model_config"),
    ("megatron.core.utils", "unwrap_model"),
    ("megatron.training", "get_args"),
    ("megatron.training.argument_utils", "gpt_config_from_args"),
    ("megatron.training.argument_utils", "hybrid_config_from_args"),
    ("megatron.training.argument_utils", "pretrain_cfg_container_from_args"),
    ("megatron.training.arguments", "add_megatron_arguments"),
    ("megatron.training.arguments", "core_transformer_config_from_args"),
    ("megatron.training.arguments", "parse_and_validate_args"),
    ("megatron.training.datasets.data_samplers", "build_pretraining_data_loader"),
    ("megatron.training.global_vars", "get_tensorboard_writer"),
    ("megatron.training.global_vars", "get_tokenizer"),
    ("megatron.training.global_vars", "get_wandb_writer"),
    ("megatron.training.training", "cyclic_iter"),
    ("megatron.training.training", "evaluate_and_print_results"),
    ("megatron.training.training", "get_forward_backward_func"),
    ("megatron.training.training", "get_model"),
    ("megatron.training.training", "initialize_megatron"),
    ("megatron.training.training", "pretrain"),
    ("megatron.training.training", "save_checkpoint_and_time"),
    ("megatron.training.training", "train_step"),
    ("megatron.training.training", "training_log"),
    ("megatron.training.wandb_utils", "on_save_checkpoint_success"),
)
"""(module, name) of everything the package takes from Megatron, sorted; a test reads the package and compares."""

PARSES_INSIDE, TAKES_PROVIDER, TAKES_CONFIG = "0.17", "0.18", "0.19"
"""The generations of `megatron.training.pretrain`: it parses the command line itself; it takes what a script has parsed
and a `model_provider`; it builds the model from a configuration in its first argument."""

ONLY_IN: dict[tuple[str, str], tuple[str, ...]] = {
    ("megatron.core.models.gpt.gpt_layer_specs", "get_gpt_decoder_block_spec"): (PARSES_INSIDE, TAKES_PROVIDER),
    ("megatron.core.models.hybrid.hybrid_model", "HybridModel"): (TAKES_PROVIDER, TAKES_CONFIG),
    ("megatron.training.argument_utils", "gpt_config_from_args"): (TAKES_CONFIG,),
    ("megatron.training.argument_utils", "hybrid_config_from_args"): (TAKES_PROVIDER, TAKES_CONFIG),
    ("megatron.training.argument_utils", "pretrain_cfg_container_from_args"): (TAKES_PROVIDER, TAKES_CONFIG),
    ("megatron.training.arguments", "core_transformer_config_from_args"): (PARSES_INSIDE, TAKES_PROVIDER),
    ("megatron.training.arguments", "parse_and_validate_args"): (TAKES_PROVIDER, TAKES_CONFIG),
    ("megatron.training.training", "get_model"): (PARSES_INSIDE, TAKES_PROVIDER),
    ("megatron.training.training", "initialize_megatron"): (PARSES_INSIDE,),
}
"""What is asked of some generations only: others have another thing in its place, or nothing."""

# (module, function, parameters we pass or read by name)
EXPECTED_PARAMETERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "megatron.training.training",
        "training_log",
        ("loss_dict", "learning_rate", "iteration", "skipped_iter", "grad_norm"),
    ),
    ("megatron.training.training", "save_checkpoint_and_time", ("iteration",)),
    ("megatron.training.training", "train_step", ("model", "optimizer")),
    ("megatron.training.training", "pretrain", ("train_valid_test_dataset_provider", "forward_step_func")),
)


def generation() -> str:
    """Which of the three the installed `pretrain` is of, by its own parameters: builds between releases are told apart
    too."""
    parameters = inspect.signature(borrow("megatron.training.training", "pretrain")).parameters
    if "extra_args_provider" in parameters:
        return PARSES_INSIDE
    provider = parameters.get("model_provider")
    return TAKES_PROVIDER if provider is not None and provider.default is provider.empty else TAKES_CONFIG


def asked_of(kind: str) -> list[tuple[str, str]]:
    """(module, name) of what a generation must have."""
    return [symbol for symbol in BORROWED if kind in ONLY_IN.get(symbol, (kind,))]


def megatron_version() -> str:
    """The installed megatron-core version, or 'none'."""
    try:
        return str(importlib.import_module("megatron.core").__version__)
    except ImportError:
        return "none"


def borrow(module: str, name: str) -> Any:
    """The attribute `module.name` of the installed Megatron.

    Raises:
        MegatronMismatch: it is not there; the message has its path, the installed version and the versions seen.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise mismatch(f"{module}.{name}", error) from error


def mismatch(what: str, error: Exception) -> MegatronMismatch:
    """The error that names what the installed Megatron lacks."""
    return MegatronMismatch(
        f"megatron-core {megatron_version()} has no {what} ({error}). This package was seen to work with "
        f"megatron-core {SEEN_VERSIONS}: install that version, or adapt megatron_hybrid/mcore. "
        f"A pretrain script of one's own also runs on {' and '.join(ALSO_SEEN)}."
    )


def check_parameters(path: str, function: Any, expected: tuple[str, ...]) -> None:
    """Raises MegatronMismatch where `function` no longer takes the parameters we rely on."""
    missing = [name for name in expected if name not in inspect.signature(function).parameters]
    if missing:
        raise MegatronMismatch(
            f"{path} of megatron-core {megatron_version()} has no parameter {', '.join(missing)}, which this package "
            f"relies on (seen with {SEEN_VERSIONS}). Install that version, or adapt megatron_hybrid/mcore."
        )


def check_used(path: str, function: Any, names: tuple[str, ...]) -> None:
    """Raises MegatronMismatch where the code of `function` no longer uses the names that we rely on its using."""
    missing = [name for name in names if name not in inspect.unwrap(function).__code__.co_names]
    if missing:
        raise MegatronMismatch(
            f"{path} of megatron-core {megatron_version()} does not use {', '.join(missing)}, through which this "
            f"package reaches into it (seen with {SEEN_VERSIONS}). Install that version, or adapt "
            "megatron_hybrid/mcore."
        )


def check_megatron() -> None:
    """Looks at every borrowed symbol; call before a model is built.

    Raises:
        MegatronMismatch: a symbol, a parameter or an attribute is missing.
        ConfigError: the `apex` that is installed is not NVIDIA's.
    """
    check_apex()
    kind = generation()
    for module, name in asked_of(kind):
        borrow(module, name)
    for module, name, expected in EXPECTED_PARAMETERS:
        check_parameters(f"{module}.{name}", borrow(module, name), expected)
    gpt = borrow("megatron.core.models.gpt", "GPTModel")
    if kind == PARSES_INSIDE:
        check_used("GPTModel._postprocess", gpt._postprocess, ("post_process", "output_layer", "_scale_logits"))
    else:
        check_parameters("GPTModel.forward", gpt.forward, ("output_processor", "output_processor_context"))
        hybrid = borrow("megatron.core.models.hybrid.hybrid_model", "HybridModel")
        check_used("HybridModel.forward", hybrid.forward, ("post_process", "output_layer", "_scale_logits"))
    check_used("GPTModel._scale_logits", gpt._scale_logits, ("use_mup", "mup_output_mult"))
    optimizer = borrow("megatron.core.optimizer", "ChainedOptimizer")
    check_used("ChainedOptimizer.step", optimizer.step, ("get_grad_norm", "step_with_ready_grads"))


def check_apex() -> None:
    """`pip install apex` installs an unrelated web toolkit that Megatron would try to import.

    Raises:
        ConfigError: an `apex` without NVIDIA's modules is installed.
    """
    apex = importlib.util.find_spec("apex")
    if apex is None:
        return
    # Looked for in its folder, not imported: the toolkit's own code need not even run on this Python.
    if PathFinder.find_spec("apex.multi_tensor_apply", apex.submodule_search_locations or []) is None:
        raise ConfigError(
            "the installed package 'apex' is not NVIDIA Apex: it has no apex.multi_tensor_apply. PyPI's 'apex' is an "
            "unrelated web toolkit. Run `pip uninstall apex`; NVIDIA's comes with NGC images or from source, and "
            "Megatron runs without it."
        )
