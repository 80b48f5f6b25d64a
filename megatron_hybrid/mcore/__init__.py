"""Everything that is borrowed from megatron-core and megatron-training; README.md lists it with reasons.

symbols.py         the list, and the check that the installed Megatron has all of it
groups.py          Megatron's parallel state as one ParallelContext
model.py           the seam: response rows, head shards, models with and without output_processor, all stages
unsliced.py        a model without sequence and context parallelism, for the length of a block: generation
builder.py         a model beside the student, in the way of the installed version
head_parts.py      the LM head as a plain product, where it is one
kv_cache.py        the cache of generation, without the rows that have finished
second_model.py    a frozen model beside the student, of any shape, or a copy of the student
architecture.py    which of Megatron's arguments belong to a model, and which to the job
chosen_parts.py    whose layers and optimizer Megatron has picked, said at the start
training.py        arguments, writers, settings that are refused
finite_steps.py    a step whose gradient is not finite is not taken
checkpoint_io.py   torch_dist checkpoints as whole tensors
plain_reading.py   checkpoints read without running what they hold; checksums
save_signals.py    the checkpoint writer's helper: kept from signals, ended with its rank
"""
