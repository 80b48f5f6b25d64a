"""Checkpoints between formats: a Hugging Face folder, a dictionary of Megatron tensors, a Megatron checkpoint.

    smollm2.py ──► Hugging Face folder ──► convert.py ──► tensors ──► mcore/checkpoint_io.py ──► torch_dist checkpoint
                                              ▲              │                 │
                                              └── prune.py ◄─┴─────────────────┘

`hf_config.py` translates the architecture beside the tensors; `fingerprint.py` says whether two models count in the
same tokens; `latest.py` which checkpoint of a folder is the newest whole one. Nothing is imported here.
"""
