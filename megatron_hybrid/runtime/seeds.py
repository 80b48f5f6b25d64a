"""One root seed to every random number of a run: (seed, step, prompt, sample) is enough to draw a sample again."""

import numpy as np


def request_seed(seed: int, step: int, prompt_id: int) -> int:
    """The seed of a server's samples for one prompt; from it on the samples have their own, up to 2^32 of them."""
    return int(np.random.SeedSequence([seed, step, prompt_id]).generate_state(1, np.uint64)[0]) >> 2


def uniforms(seed: int, step: int, prompt_id: int, sample: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the randomness of one response, independent of layout, batch and rank.

    Streams of different keys are independent (numpy SeedSequence, PCG64).
    """
    return np.random.default_rng([seed, step, prompt_id, sample]).random(count)
