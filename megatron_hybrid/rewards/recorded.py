"""The reward that a file of rollouts holds for each response; a demonstration, which has none, earns 1.

With baseline `none`, imitation weight 0 and reward weight 1 every token of a demonstration then has the advantage 1:
cross-entropy.
"""

from megatron_hybrid.records import Prompt


class RecordedReward:
    name = "recorded"
    main_thread_only = False

    def score(self, prompt: Prompt, response: str) -> float:
        return float(prompt.entry["record"].get("reward", 1.0))
