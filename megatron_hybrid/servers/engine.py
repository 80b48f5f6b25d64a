"""What a run asks of an inference engine's server. Token ids go in and come out: text would be cut into tokens anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_hybrid.errors import ServerError


@dataclass(frozen=True)
class Completion:
    """One response."""

    token_ids: tuple[int, ...]
    """The token that ended it included."""
    log_probs: tuple[float, ...]
    """One per token, nats, at temperature 1."""
    truncated: bool
    """It ran out of room."""


TopTokens = list[tuple[int, float]]
"""The likeliest tokens at one position: (id, log-probability in nats at temperature 1), likeliest first."""


@dataclass(frozen=True)
class Sampling:
    """How to sample: the whole distribution at temperature 1, whatever the server's own defaults are."""

    max_tokens: int
    stop_ids: tuple[int, ...]


class Engine(Protocol):
    """A server with a model."""

    def complete(
        self, prompts: Sequence[tuple[Sequence[int], int]], n: int, sampling: Sampling
    ) -> list[list[Completion] | ServerError]:
        """`n` responses to each of (token ids, seed); the error, where it is down, refuses, or answers something else
        at every attempt."""
        ...

    def top_tokens(self, texts: Sequence[tuple[Sequence[int], int]], k: int) -> list[list[TopTokens]]:
        """For each of (token ids, first): the k likeliest tokens at positions first, first + 1, ... of the text, each
        given what stands before it.

        Raises:
            ServerError: it is down, refuses, or answers something else at every attempt.
        """
        ...

    def load_weights(self, folder: str) -> None:
        """Takes the weights of a Hugging Face folder that the server can read, and forgets what it knew of prompts.
        Raises as `top_tokens`."""
        ...


def likeliest(pairs: Sequence[tuple[int, float]], k: int) -> TopTokens:
    """The k likeliest, of equal ones the lower id first. Servers add the text's own token, which may be unlikely."""
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]


_LOWEST_FP32 = -3.4028234e38


def is_log_prob(value: object) -> bool:
    """Whether a server's number can be the logarithm of a probability above 0; rounding may lift one a little over."""
    return isinstance(value, int | float) and not isinstance(value, bool) and _LOWEST_FP32 <= value < 1e-3


def is_token_id(value: object) -> bool:
    """Whether a server's number can be a token's."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
