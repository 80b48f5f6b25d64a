"""`python -m megatron_hybrid.cli.train`, or `megatron-hybrid-train`: a whole online run from Megatron's command line.

Under torchrun or Slurm this is every rank's program. Megatron's own flags describe model, layout, optimizer and
checkpoints; `--hybrid-*` flags the method, prompts and teacher. On a machine without a GPU add
`--distributed-backend gloo`.
"""

from __future__ import annotations


def main() -> None:
    """Parses, checks, trains."""
    import megatron_hybrid as mh

    mh.cpu.enable()

    from megatron_hybrid.mcore.symbols import borrow

    args = borrow("megatron.training.arguments", "parse_and_validate_args")(mh.add_hybrid_args)
    model_config = borrow("megatron.training.argument_utils", "gpt_config_from_args")(args)
    container = borrow("megatron.training.argument_utils", "pretrain_cfg_container_from_args")(args, model_config)
    model_type = borrow("megatron.core.enums", "ModelType").encoder_or_decoder
    mh.pretrain_hybrid(container, None, model_type, mh.HybridForwardStep())


if __name__ == "__main__":
    main()
