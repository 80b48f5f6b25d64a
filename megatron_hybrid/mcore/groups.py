"""Megatron's parallel state as one ParallelContext, read once after Megatron has initialised it."""

from megatron.core import parallel_state

from megatron_hybrid.parallel import GroupView, ParallelContext


def parallel_context() -> ParallelContext:
    """The axes of this job; a group of one never issues a collective."""

    def view(group: object) -> GroupView:
        seen = GroupView.of(group)
        return seen if seen.size > 1 else GroupView()

    return ParallelContext(
        tp=view(parallel_state.get_tensor_model_parallel_group()),
        pp=view(parallel_state.get_pipeline_model_parallel_group()),
        dp=view(parallel_state.get_data_parallel_group()),
        cp=view(parallel_state.get_context_parallel_group()),
        dp_cp=view(parallel_state.get_data_parallel_group(with_context_parallel=True)),
    )
