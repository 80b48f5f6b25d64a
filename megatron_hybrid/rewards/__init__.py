"""From responses to rewards: one file per reward, one rubric that adds them up.

    RolloutBatch ──► rubric.py ──► reasoning_gym.py | exact_match.py | math_answer.py | python_function.py | http.py
                        │          by_source.py: the first of these for generated questions, another for files
                        │          python_tests.py: the response's code, run in sandbox.py
                        └──► RewardBatch                            build.py: the rubric that the settings ask for

    worker_pool.py ──► worker.py, processes of their own, in which any of them but http.py can be made (by_name.py)

A model's text is hostile until scored: garbage scores low, never crashes, and runs in the sandbox or not at all. Our
own mistakes are not scored. What fails for one response is the error of that response.
"""
