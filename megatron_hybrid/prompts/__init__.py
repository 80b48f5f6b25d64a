"""From a task name or a file to prompts ready for the model.

    sources.py ──Question──► order.py ──► template.py ──token ids──► stream.py ──► list[Prompt]

    reasoning_gym.py   generated questions          file_source.py   those of a file     recorded.py   with responses
    mixture.py         several sources in shares    record_file.py   how every file is read (jsonl.py | parquet.py)
    question.py        what a question and a source are

Nothing here knows a model, a reward or Megatron; everything is checked before any model exists.
"""
