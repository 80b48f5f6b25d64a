"""The online step and what a run leaves behind. The only room that knows the order of the others.

prepare.py    what can be wrong with settings, prompts and teachers, found out before Megatron starts
pretrain.py   Megatron's pretrain with the loop around its schedule
loop.py       draw -> sample -> score beside the teacher -> credit -> [Megatron's step] -> measure -> report
clock.py      seconds of its stages
scoring.py    rewards in a thread, and to all ranks that need them; failed_samples.py: those that fail
updates.py    which rollouts a step learns from: mini-batches and epochs of a collection
collection.py rollouts that later steps still learn from, kept beside a checkpoint
identity.py   what a checkpoint learnt from, held against the run that goes on
peers.py      who died or hangs
nonfinite.py  steps that are not finite: kept, counted, the run stopped; infinite_kl.py: tokens by name
credit.py     rewards to the credit of each token, with the settings of the step
measure.py    numbers and samples of a step
report.py     the run folder and the progress line: journal.py, samples.py, summary.py, origin.py; outlets.py: what
              is done where one of them cannot be written
plots.py      figures of a run from its metrics.jsonl, read by curves.py
"""
