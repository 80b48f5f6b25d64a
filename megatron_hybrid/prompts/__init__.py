"""From a task name or a file to prompts ready for the model.

    sources.py (jsonl.py | reasoning_gym.py) ──Question──► template.py ──token ids──► stream.py ──► list[Prompt]

Nothing here knows a model, a reward or Megatron; everything is checked before any model exists.
"""
