"""From prompts to responses of the live student, on any TP x PP x VPP layout.

    list[Prompt] ──► generate.py (Sampler) ──► sampling.py: one token from split logits ──► assemble.py ──► RolloutBatch
                     wave.py: rows of one decoding batch

The random numbers of a response derive from (seed, step, prompt, sample), so layouts draw alike and a response can be
drawn again. Not here: rewards, credit, engines outside Megatron.
"""
