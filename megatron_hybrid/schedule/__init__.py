"""Where the method meets Megatron's schedule: batches in, a loss and its global count out.

    RolloutBatch ──► microbatch.py (layout.py: where positions lie; normalise.py: the only divisor) ──► HybridMicrobatch
    inject.py feeds them to Megatron's schedule ──► forward_step.py: model, op, loss ──► Megatron's backward

Batch first before microbatch.py, sequence first after it. Megatron is wrapped in inject.py and nowhere else, for the
length of a block.
"""
