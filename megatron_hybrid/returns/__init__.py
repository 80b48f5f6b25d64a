"""Credit assignment: rewards and imitation costs to one advantage per token. torch and nothing else.

baselines.py         rewards [b] -> advantages [b]
returns_to_go.py     costs [b, s] -> discounted, strictly future sums [b, s]
weights.py           both, as the function that the op calls between its two passes
"""
