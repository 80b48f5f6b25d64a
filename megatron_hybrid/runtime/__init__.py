"""The machine under a run: a CPU that looks like a GPU to Megatron, local ranks, random numbers.

cpu.py         stand-ins for the torch.cuda calls Megatron makes: explicit, reversible, nothing where a GPU is
cpu_layers.py  norms and attention for sequence and context parallelism and packed sequences, without a GPU
cpu_hybrid.py  HybridModel of attention, MLP and expert layers, without a GPU
spawn.py       RankPool: local gloo ranks that stay alive for many jobs
seeds.py       (seed, step, prompt, sample) to the numbers of one response

Nothing here knows the method; Megatron is touched only once `cpu.enable()` is called.
"""
