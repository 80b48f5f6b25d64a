"""The online step and what a run leaves behind. The only room that knows the order of the others.

pretrain.py   checks everything, then calls Megatron's pretrain with the loop around its schedule
loop.py       draw -> sample -> score -> credit -> annotate -> [Megatron's step] -> measure -> report
report.py     the run folder and the progress line: journal.py, samples.py, summary.py
plots.py      figures of a run from its metrics.jsonl, read by curves.py
"""
