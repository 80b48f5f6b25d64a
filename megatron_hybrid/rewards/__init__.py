"""From responses to rewards: one file per reward, one rubric that adds them up.

    RolloutBatch ──► rubric.py ──► by_source.py ──► reasoning_gym.py | exact_match.py | math_answer.py ──► RewardBatch

A model's text is hostile until scored: garbage scores low, never crashes, never runs. Our own mistakes are not scored.
"""
