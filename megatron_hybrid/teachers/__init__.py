"""From micro-batches to what the op needs of the teacher.

    list[HybridMicrobatch] ──► base.py (Teacher) ──► a payload for each, on the last stage

    spec.py      the setting `teacher_load` as a record        build.py     the teacher that it asks for
    frozen.py    a model of any shape from its checkpoint      snapshot.py  a copy of the student, fixed or averaged
    tasks.py     a teacher for each task                       mixture.py   several teachers as one distribution
    topk.py      the most likely tokens of another teacher     blocks.py    how many rows of logits at once
    remote.py    those of an inference engine's server

Payloads of whole distributions are hidden states and the teachers' own heads: logits [n, v/tp] exist only while they
are read. A teacher of one's own is an object with `annotate`, passed as `HybridForwardStep(teacher=...)`.
"""
