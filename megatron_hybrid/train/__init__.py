"""The online step and what a run leaves behind. The only room that knows the order of the others.

prepare.py    what can be wrong with settings, prompts and teachers, found out before Megatron starts
pretrain.py   Megatron's pretrain with the loop around its schedule
loop.py       draw -> sample -> score -> credit -> annotate -> [Megatron's step] -> measure -> report
updates.py    which rollouts a step learns from: mini-batches and epochs of a collection
credit.py     rewards to the credit of each token, with the settings of the step
measure.py    numbers and samples of a step
report.py     the run folder and the progress line: journal.py, samples.py, summary.py
plots.py      figures of a run from its metrics.jsonl, read by curves.py
"""
