"""From micro-batches to what the op needs of the teacher.

    list[HybridMicrobatch] ──► base.py (Teacher) : frozen.py ──► HiddenPayload for each, on the last stage

A payload is hidden states and the teacher's own head: logits [n, v/tp] exist only while the op reads them. A teacher of
one's own is an object with `annotate`, passed as `HybridForwardStep(teacher=...)`.
"""
