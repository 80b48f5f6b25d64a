"""Groups of responses from a file of records {"prompt": str, "response": str}: rollouts of other runs, demonstrations.

    .jsonl lines, .parquet rows -> a Question per group, its responses as token ids -> order and template as any other

Fields of a record, besides "answer" and "task" as questions have them:

    response | response_ids   text, to which the end-of-sequence token is added unless "truncated"; or token ids as
                              they were sampled
    truncated                 it was cut off; by default where ids do not end in the end-of-sequence token
    reward                    in all records or none; without it they are demonstrations
    logprobs                  one number per token, nats, of whoever sampled it; in all records or none
    group                     records with the same one belong together, else those with the same prompt and task

Everything is read and tokenised at once: a bad line 90 000 is a message in the first minute. With a group size of 1
each record is by itself, whatever its group. Columns of a parquet file that are null count as absent. A group that lost
a record to `on_bad_record` "skip" is left out as a whole.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts.file_source import FileSource
from megatron_hybrid.prompts.question import LeftOut, Question, Refuse
from megatron_hybrid.prompts.record_file import check_text, checked_record, field_names, parsed_records
from megatron_hybrid.records import RecordedResponse

SOURCE = "recorded"
"""What `entry["source"]` says of such responses."""

_EXPECTED = '{"prompt": "...", "response": "..."}'
_SHOWN_GROUPS = 3
_LARGEST_FP32 = 3.4028234e38
_MOST_LOG_PROB = 1e-3
"""Rounding may lift the log of a probability a little above 0."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Line:
    record: dict[str, Any]
    place: str
    """As messages say it: `line 7`."""
    response: RecordedResponse

    @property
    def group(self) -> tuple[Any, ...]:
        if "group" in self.record:
            return ("group", self.record["group"])
        return ("prompt", self.record["prompt"], self.record.get("task"))


def read_rollouts(path: str | Path, tokenizer: Any, group_size: int, *, on_bad_record: str = "stop") -> FileSource:
    """The groups of a file, each a question with `group_size` responses, in the order of their first records.

    tokenizer      a transformers tokenizer with an end-of-sequence token
    on_bad_record  "stop", or "skip": leave out records that cannot be used, and the groups that are not whole then

    Raises:
        DataError: it cannot be read, or holds a record that cannot be used, or groups of another size.
    """
    path = Path(path)

    def line(record: Any, place: dict[str, int]) -> _Line:
        if isinstance(record, dict):
            record = {name: value for name, value in record.items() if value is not None}
        record = checked_record(record, ("prompt",))
        ((unit, number),) = place.items()
        entry = {"source": SOURCE, **place, "record": record}
        return _Line(record, f"{unit} {number}", _response(record, entry, tokenizer))

    records = parsed_records(path, line, what="rollouts", expected=_EXPECTED, on_bad_record=on_bad_record)
    lines = records.found
    for field in ("reward", "logprobs"):
        _all_or_none(path, field, lines)
    groups: dict[tuple[Any, ...], list[_Line]] = {}
    for number, each in enumerate(lines):
        groups.setdefault((number,) if group_size == 1 else each.group, []).append(each)
    whole = list(groups.values())
    left_out = [] if records.left_out is None else [records.left_out]
    if on_bad_record == "skip":
        whole, broken = _whole_groups(path, whole, group_size)
        left_out += broken
    _check_groups(path, whole or list(groups.values()), group_size)
    return FileSource([_question(group, path.stem) for group in whole], str(path), tuple(left_out))


def too_long_response(max_response_length: int) -> Refuse:
    """What a source is told to leave out: groups with a response that has no room."""

    def refuse(question: Question) -> str | None:
        longest = max(len(response.token_ids) for response in question.responses)
        return f"with a response of more than {max_response_length} tokens" if longest > max_response_length else None

    return refuse


def _response(record: dict[str, Any], entry: dict[str, Any], tokenizer: Any) -> RecordedResponse:
    """A ValueError says what is wrong with the record."""
    if ("response" in record) == ("response_ids" in record):
        raise ValueError(f"needs 'response' or 'response_ids', one of the two (it has {field_names(record)})")
    if not isinstance(record.get("group", ""), str | int):
        raise ValueError(f"'group' is a {type(record['group']).__name__}, not a name or a number")
    truncated = record.get("truncated")
    if not isinstance(truncated, bool | None):
        raise ValueError(f"'truncated' is a {type(truncated).__name__}, not true or false")
    if "response" in record:
        check_text("response", record["response"])
        ids = list(tokenizer(record["response"], add_special_tokens=False)["input_ids"])
        ids += [] if truncated else [tokenizer.eos_token_id]
    else:
        ids = record["response_ids"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError("'response_ids' is no list of whole numbers")
        size = len(tokenizer)
        if outside := [token for token in ids if not 0 <= token < size]:
            raise ValueError(f"'response_ids' holds {reprlib.repr(outside[0])}, and the tokenizer has {size} tokens")
        truncated = (not ids or ids[-1] != tokenizer.eos_token_id) if truncated is None else truncated
    if not ids:
        raise ValueError("the response has no token to learn from")
    if not _is_number(reward := record.get("reward", 0.0)):
        raise ValueError(f"'reward' is {reprlib.repr(reward)}, not a finite number")
    return RecordedResponse(tuple(ids), _log_probs(record, len(ids)), bool(truncated), entry)


def _log_probs(record: dict[str, Any], length: int) -> tuple[float, ...] | None:
    log_probs = record.get("logprobs")
    if log_probs is None:
        return None
    if not isinstance(log_probs, list) or not all(map(_is_number, log_probs)):
        raise ValueError("'logprobs' is no list of finite numbers")
    if len(log_probs) != length:
        raise ValueError(
            f"'logprobs' has {len(log_probs)} numbers, but the response {length} tokens, end-of-sequence included"
        )
    if (largest := max(log_probs, default=0)) > _MOST_LOG_PROB:
        raise ValueError(f"'logprobs' holds {largest}, which is above 0 and so no logarithm of a probability")
    return tuple(map(float, log_probs))


def _is_number(value: Any) -> bool:
    """Whether it is a number that fp32 has, in which gradients count: not NaN, not infinite, not true."""
    return type(value) in (int, float) and abs(value) <= _LARGEST_FP32


def _all_or_none(path: Path, field: str, lines: Sequence[_Line]) -> None:
    without = [each.place for each in lines if field not in each.record]
    if 0 < len(without) < len(lines):
        raise DataError(
            f"{path}: {len(without)} of {len(lines)} records have no {field!r}, the first is {without[0]}, and the "
            "others do: a run would treat them differently. Give it in all of them or in none."
        )


def _whole_groups(
    path: Path, groups: Sequence[list[_Line]], group_size: int
) -> tuple[list[list[_Line]], list[LeftOut]]:
    """The groups with this many responses to one question, and the account of the others, also in the log."""
    whole, reasons = [], []
    for group in groups:
        if len(group) != group_size:
            reasons.append(f"{group[0].place}: {len(group)} of {group_size} responses")
        elif odd := _another_question(group):
            reasons.append(f"{group[0].place}: {odd.place} has another prompt, task or answer")
        else:
            whole.append(group)
    if not reasons:
        return whole, []
    shown = tuple(reasons[:_SHOWN_GROUPS])
    _log.warning(
        "%s: %d of %d groups are not whole and are left out: %s%s",
        path,
        len(reasons),
        len(groups),
        "; ".join(shown),
        "; ..." if len(reasons) > len(shown) else "",
    )
    return whole, [LeftOut(str(path), "groups", len(reasons), len(groups), shown)]


def _another_question(group: Sequence[_Line]) -> _Line | None:
    """The first record of a group that is not about what its first record is about."""
    first = group[0].record
    names = ("prompt", "task", "answer")
    return next((each for each in group[1:] if any(each.record.get(n) != first.get(n) for n in names)), None)


def _check_groups(path: Path, groups: Sequence[Sequence[_Line]], group_size: int) -> None:
    """Raises DataError, naming lines, unless every group has this many responses to one prompt."""
    wrong = [group for group in groups if len(group) != group_size]
    if wrong:
        shown = "; ".join(
            f"{', '.join(each.place for each in group[:4])}{', ...' if len(group) > 4 else ''} are {len(group)}"
            for group in wrong[:_SHOWN_GROUPS]
        )
        raise DataError(
            f"{path}: {len(wrong)} of {len(groups)} groups do not have the {group_size} responses of "
            f"--hybrid-group-size: {shown}. Records belong together by 'group', else by prompt and task. Set the group "
            "size that the file has; with 1 each record is by itself."
        )
    for group in groups:
        if odd := _another_question(group):
            raise DataError(
                f"{path}: {group[0].place} and {odd.place} are one group ({reprlib.repr(odd.record.get('group'))}) but "
                "not one prompt, task and answer: a group is compared with itself. Number the groups anew."
            )


def _question(group: Sequence[_Line], default_task: str) -> Question:
    record = group[0].record
    return Question(
        record["prompt"],
        record.get("task", default_task),
        record.get("answer"),
        group[0].response.entry,
        responses=tuple(each.response for each in group),
    )
