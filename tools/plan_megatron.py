"""What Megatron's own estimator, `megatron.training.theoretical_memory_usage`, says of a plan.

It covers dense and expert GPTs: weights and optimizer of the most loaded stage, under bf16; activations of the first
stage, from Table 2 of arXiv 2205.05198 where sequence parallelism and selective recomputation are on, else another
formula plus 5 %. It knows no context parallelism: the distributed optimizer is divided by dp alone, so its figure is
above the truth at cp > 1, and it is told seq_length / cp for the activations. Grouped queries and the third matrix of a
gated MLP are not in its activations, forward-only passes and full recomputation neither.
"""

from argparse import Namespace

from plan_model import Plan

from megatron_hybrid.mcore.symbols import borrow

_MODULE = "megatron.training.theoretical_memory_usage"


def weights_and_optimizer(plan: Plan) -> int:
    """Bytes of weights, gradients and optimizer on the most loaded rank; of bf16 training, whatever the plan's type."""
    return int(borrow(_MODULE, "compute_weight_and_optimizer_memory")(_args(plan)))


def activations(plan: Plan) -> tuple[int, int]:
    """Bytes of the student's activations on the first and on the last rank of a pipeline.

    The last holds fewer micro-batches: under 1F1B one; interleaved, (vpp - 1) pp + 1 chunks where the first holds
    vpp pp + pp - 1.
    """
    layout = plan.layout
    selective = layout.sequence_parallel
    name = "compute_activation_memory" if selective else "compute_activation_memory_without_sp"
    estimate, args = borrow(_MODULE, name), _args(plan)
    args.padded_vocab_size = 0  # logits are a line of their own
    first = estimate(args, plan.num_microbatches)
    if layout.pp == 1:
        last = first
    elif layout.vpp == 1:
        last = estimate(args, 1)
    else:
        last = first * ((layout.vpp - 1) * layout.pp + 1) / (layout.vpp * layout.pp + layout.pp - 1)
    return int(first), int(last)


def _args(plan: Plan) -> Namespace:
    """The arguments that the estimator reads."""
    shape, layout, step = plan.student, plan.layout, plan.step
    return Namespace(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        group_query_attention=shape.groups != shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        swiglu=shape.gated,
        normalization="RMSNorm" if shape.norm_size == 1 else "LayerNorm",
        untie_embeddings_and_output_weights=not shape.tied,
        padded_vocab_size=plan.columns * layout.tp,
        num_experts=None,
        moe_shared_expert_intermediate_size=None,
        moe_latent_size=None,
        mtp_num_layers=None,
        multi_latent_attention=False,
        add_bias_linear=False,
        world_size=layout.ranks,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_tensor_parallel_size=layout.tp,
        expert_model_parallel_size=1,
        data_parallel_size=layout.dp,
        use_distributed_optimizer=step.distributed_optimizer,
        seq_length=plan.width // layout.cp,
        micro_batch_size=step.micro_batch,
    )
