"""One decoding batch: a table of rows, which of them still write, and the columns they may not look at.

    row    prompt, right-aligned ──┐            ┌── response
           . . . p p p p p p p p p p | r r r r stop . .        columns before `border` are read in one forward pass
           p p p p p p p p p p p p p | r r r r r r r r r       of the distinct prompts; every response starts there

Prompts end in the same column where attention obeys masks. Where it does not, they start in the same column instead, no
mask is needed, and a row that is still inside its prompt takes its next prompt token in place of a sampled one.

No collective.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hybrid.records import Prompt
from megatron_hybrid.rollouts.assemble import Sample
from megatron_hybrid.runtime.seeds import uniforms

Request = tuple[Prompt, int]
"""A prompt and which of its samples."""


class Wave:
    """Rows that are decoded together, n of them at first, columns [0, end).

    requests  grouped by prompt: samples of the same prompt are neighbours
    aligned   prompts end in the same column
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        max_response_length: int,
        stop_ids: Sequence[int],
        aligned: bool,
        step: int,
        seed: int,
        device: torch.device,
    ) -> None:
        lengths = [len(prompt.token_ids) for prompt, _ in requests]
        starts = [max(lengths) - length if aligned else 0 for length in lengths]
        borders = [start + length for start, length in zip(starts, lengths, strict=True)]
        self.border = min(borders)
        """Columns that every row has before anything is sampled."""
        self.end = max(borders) + max_response_length
        tokens = torch.zeros(len(requests), self.end, dtype=torch.long)
        noise = torch.zeros(len(requests), self.end, dtype=torch.float64)
        for row, (prompt, sample) in enumerate(requests):
            tokens[row, starts[row] : borders[row]] = torch.tensor(prompt.token_ids)
            draws = uniforms(seed, step, prompt.prompt_id, sample, max_response_length)
            noise[row, borders[row] : borders[row] + max_response_length] = torch.from_numpy(draws)
        first: dict[int, int] = {}
        for row, (prompt, _) in enumerate(requests):
            first.setdefault(prompt.prompt_id, row)
        places = {prompt_id: place for place, prompt_id in enumerate(first)}

        self.first = torch.tensor(list(first.values()), device=device)
        """[prompts]: a row of each distinct prompt."""
        self.place = torch.tensor([places[prompt.prompt_id] for prompt, _ in requests], device=device)
        """[n]: the place of each row's prompt in `first`."""
        self.tokens, self._noise = tokens.to(device), noise.to(device)
        self._starts = torch.tensor(starts, device=device)
        self._borders = torch.tensor(borders, device=device)
        self._padded = max(starts) > 0
        self._log_probs = torch.zeros(len(requests), self.end, device=device)
        self._stops = torch.tensor(sorted(stop_ids), device=device)
        self._room = max_response_length
        self._stop_at = self._borders + max_response_length  # one past the last token of each row, once known
        self._writing = torch.ones(len(requests), dtype=torch.bool, device=device)
        self.rows = torch.arange(len(requests), device=device)
        """[b]: the rows of the table that are in the batch."""
        self._columns = torch.arange(self.end, device=device)

    def position_ids(self, rows: Tensor, columns: slice) -> Tensor:
        """[rows, columns]: places in the sequence itself, 0 before it starts."""
        return (self._columns[columns] - self._starts[rows, None]).clamp(min=0)

    def prefill_mask(self) -> Tensor | None:
        """[prompts, 1, border, border] bool, True where a position must not look; None: causal attention is enough."""
        if not self._padded:
            return None
        columns = self._columns[: self.border]
        future = columns > columns[:, None]
        absent = columns < self._starts[self.first, None, None]
        # Columns before the start look at themselves: a softmax over nothing would be NaN, and NaN times 0 is NaN.
        return (future | (absent & (columns != columns[:, None]))).unsqueeze(1)

    def mask(self, column: int) -> Tensor | None:
        """[b, 1, 1, column + 1] bool, True where the newest position must not look; None: nowhere."""
        if not self._padded:
            return None
        return (self._columns[: column + 1] < self._starts[self.rows, None])[:, None, None]

    def uniform(self, column: int) -> Tensor:
        """[b] fp64: the noise of the tokens in `column`."""
        return self._noise[self.rows, column]

    def write(self, column: int, drawn: Tensor, log_prob: Tensor) -> None:
        """Puts what was drawn for the batch, [b] each, into the rows that still write and are past their prompts."""
        rows = self.rows
        border = self._borders[rows]
        sampled = self._writing[rows] & (border <= column)
        self.tokens[rows, column] = torch.where(sampled, drawn, self.tokens[rows, column])
        self._log_probs[rows, column] = torch.where(sampled, log_prob, 0.0)
        ends = sampled & (torch.isin(drawn, self._stops) | (column + 1 >= border + self._room))
        self._stop_at[rows] = torch.where(ends, column + 1, self._stop_at[rows])
        self._writing[rows] &= ~ends

    def leave(self, fraction: float) -> Tensor | None:
        """Takes finished rows out of the batch where they are at least `fraction` of it.

        returns  [b'] int64: the places in the batch so far that stay; None where all do. Waits for the device.
        """
        stay = self._writing[self.rows].nonzero().squeeze(-1)
        if len(self.rows) - len(stay) < max(1, fraction * len(self.rows)):
            return None
        self.rows = self.rows[stay]
        return stay

    def samples(self) -> list[Sample]:
        """The responses of all n rows."""
        ids, logs = self.tokens.cpu(), self._log_probs.cpu()
        spans = zip(self._borders.tolist(), self._stop_at.tolist(), strict=True)
        stops = set(self._stops.tolist())
        return [
            Sample(
                token_ids=tuple(ids[row, border:stop].tolist()),
                log_probs=logs[row, border:stop],
                truncated=int(ids[row, stop - 1]) not in stops,
            )
            for row, (border, stop) in enumerate(spans)
        ]
