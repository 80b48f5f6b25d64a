"""The op: student and teacher logits in, per-token loss and the closed-form gradient out. torch and nothing else.

api.py          the public function: checks, then stats pass -> weigh -> gradient
call.py         one call as the passes see it: flat tensors, counted rows, this rank's slice of the vocabulary
function.py     what all backends share: one all-gather, the merge of the shards, the autograd function
eager.py        the two passes over a shard in plain torch, row block by row block
triton_op.py    the two passes by triton_kernels.py, which is imported only when chosen
compiled.py     the same by native.py, C++ for a CPU, or torch.compile; the torch backend where neither compiles
divergence.py   the other divergences by name: KLs to a mixture of student and teacher
mixtures.py     their two passes over a shard; triton_mixtures.py, compiled_mixtures.py and native_mixtures.py as above
topk.py         the loss against a teacher's k likeliest tokens, all others one bucket
topk_passes.py  its two passes over a shard, and the merge
lm_head.py      the loss from hidden states: LM heads fused in, logits of a chunk of tokens at a time
lm_head_function.py  its autograd function, in two passes or one
lm_head_chunks.py    heads, chunks, and where dh and dW go
reference.py    the judge: float64, whole vocabulary, a page of formulas
diagnostics.py  norms of the two halves of the gradient, on request
"""
