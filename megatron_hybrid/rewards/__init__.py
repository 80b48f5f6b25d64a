"""From responses to rewards: one file per reward, one rubric that adds them up.

    RolloutBatch ──► rubric.py ──► reasoning_gym.py | exact_match.py | math_answer.py | python_function.py | http.py
                        │          by_source.py: the first of these for generated questions, another for files
                        └──► RewardBatch                            build.py: the rubric that the settings ask for

A model's text is hostile until scored: garbage scores low, never crashes, never runs. Our own mistakes are not scored.
"""
