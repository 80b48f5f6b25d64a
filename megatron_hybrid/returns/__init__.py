"""Credit assignment: rewards and imitation costs to one advantage per token. torch and nothing else.

reward_statistics.py  rewards [b] of every replica -> batch statistics, running mean
baselines.py          rewards [b] -> advantages [b]
returns_to_go.py      costs [b, s] -> discounted, strictly future sums [b, s]
corrections.py        log pi - log mu [n] -> importance weights of the dense and the sparse term [n]
token_table.py        tokens of this rank [n] <-> whole responses [b, s], over context-parallel ranks
task_filter.py        rewards and log q - log pi of responses [b] -> share of the imitation weight, by task
weights.py            all of it, as the function that the op calls between its two passes
"""
