"""Everything that is borrowed from megatron-core and megatron-training; README.md lists it with reasons.

symbols.py         the list, and the check that the installed Megatron has all of it
groups.py          Megatron's parallel state as one ParallelContext
model.py           the seam: response rows, head shards, models with and without output_processor, all stages
unsliced.py        a model without sequence and context parallelism, for the length of a block: generation
second_model.py    a frozen model beside the student, of any shape, or a copy of the student
architecture.py    which of Megatron's arguments belong to a model, and which to the job
chosen_parts.py    whose layers and optimizer Megatron has picked, said at the start
training.py        arguments, writers, settings that are refused
checkpoint_io.py   torch_dist checkpoints as whole tensors
"""
