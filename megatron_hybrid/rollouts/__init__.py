"""From prompts to responses of the live student, on any TP x PP x VPP layout, or of an inference engine's server.

    list[Prompt] ──► generate.py (Sampler) ──► sampling.py: one token from split logits ──► assemble.py ──► RolloutBatch
                     wave.py: rows of one decoding batch
                 └─► remote.py (RemoteSampler): a server of vLLM or SGLang in its place ────────► assemble.py

The random numbers of a response derive from (seed, step, prompt, sample), so layouts draw alike and a response can be
drawn again. Not here: rewards, credit, an engine's weights (`train/weight_sync.py`).
"""
