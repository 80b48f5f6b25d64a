"""Everything that is borrowed from megatron-core and megatron-training; README.md lists it with reasons.

symbols.py         the list, and the check that the installed Megatron has all of it
groups.py          Megatron's parallel state as one ParallelContext
model.py           response rows, head shards, a forward through all stages
training.py        arguments, writers, settings that are refused, the frozen second model
checkpoint_io.py   torch_dist checkpoints as whole tensors
"""
