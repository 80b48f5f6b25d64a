"""What a teacher's answers are on disk: they come back as they were written, and others are refused by name."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.records import HybridMicrobatch, Prompt, RecordedResponse, TopKPayload
from megatron_hybrid.rollouts.recorded import recorded_rollouts
from megatron_hybrid.schedule.microbatch import microbatches
from megatron_hybrid.teachers import store
from megatron_hybrid.teachers.store import StoredTeacher, StoreWriter, TeacherStore, response_key
from tests.planted import Planted

K = 3
MADE = {"k": K, "temperature": 1.5, "tokenizer": "f" * 64}


def prompt(number: int, *response: int, hint: tuple[int, ...] | None = None) -> Prompt:
    """A prompt of number + 1 tokens with one recorded response."""
    recorded = RecordedResponse(response, None, False, {"line": number})
    return Prompt(number, (1,) * (number + 1), "", "task", teacher_token_ids=hint, responses=(recorded,))


PROMPTS = [prompt(0, 5), prompt(2, 6, 7, 8), prompt(1, 9, 9), prompt(3, 4, 5)]


def micro_batches(prompts: list[Prompt]) -> list[HybridMicrobatch]:
    rollouts = recorded_rollouts(prompts, decode=lambda ids: "", device=torch.device("cpu"))
    return microbatches(rollouts, micro_batch_size=2, aggregation="token-mean")


def answers(batch: HybridMicrobatch) -> TopKPayload:
    """Numbers that say which token they belong to."""
    n = len(batch.targets)
    prompts = torch.tensor([p.prompt_id for p in batch.prompts])[batch.sequence_of_token]
    ids = (100 * prompts + 10 * batch.position_of_token)[:, None] + torch.arange(K)
    return TopKPayload(ids, -torch.arange(1.0, n * K + 1).view(n, K))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = StoreWriter(tmp_path / "store", "replica_00000", teacher="models/t", **MADE)
    for batch in micro_batches(PROMPTS):
        writer.add(batch, answers(batch), count=2)
    writer.flush()
    return tmp_path / "store"


def test_answers_come_back_in_any_order_and_grouping(folder):
    teacher = StoredTeacher(TeacherStore(folder, **MADE), is_last_stage=True)
    for order in (PROMPTS, PROMPTS[::-1], [PROMPTS[1], PROMPTS[3]]):
        for batch, payload in zip(micro_batches(order), teacher.annotate(micro_batches(order)), strict=True):
            assert isinstance(payload, TopKPayload)
            assert torch.equal(payload.ids, answers(batch).ids)
            assert payload.ids.dtype == torch.int64 and payload.log_probs.dtype == torch.float32
    for batch, payload in zip(micro_batches(PROMPTS), teacher.annotate(micro_batches(PROMPTS)), strict=True):
        assert payload is not None and torch.equal(payload.log_probs, answers(batch).log_probs)


def test_fewer_tokens_than_it_holds_are_the_likeliest(folder):
    (batch, _) = micro_batches(PROMPTS)
    (payload,) = StoredTeacher(TeacherStore(folder, **MADE | {"k": 2}), is_last_stage=True).annotate([batch])
    assert torch.equal(payload.ids, answers(batch).ids[:, :2])


def test_other_stages_and_responses_that_are_new_get_nothing(folder):
    opened = TeacherStore(folder, **MADE)
    batches = micro_batches(PROMPTS)
    assert StoredTeacher(opened, is_last_stage=False).annotate(batches) == [None, None]
    new = replace(batches[0], prompts=tuple(replace(p, responses=()) for p in batches[0].prompts))
    assert StoredTeacher(opened, is_last_stage=True).annotate([new]) == [None]


def test_a_response_is_known_by_all_that_the_teacher_reads():
    same = response_key(prompt(1, 3, 4))
    assert response_key(prompt(1, 3, 4)) == same
    others = [prompt(1, 3), prompt(2, 3, 4), prompt(1, 3, 4, hint=(1, 1, 2)), prompt(1, 1, 3, 4)]
    assert len({same, *map(response_key, others)}) == 5
    # A token more in front and one less behind is another response, though the sequence is the same.
    shifted = Prompt(0, (1, 1, 3), "", "", responses=(RecordedResponse((4,), None, False, {}),))
    assert response_key(shifted) != same


def test_a_long_store_is_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "TOKENS_PER_FILE", 4)
    writer = StoreWriter(tmp_path, "replica_00000", teacher="t", **MADE)
    for batch in micro_batches(PROMPTS):
        writer.add(batch, answers(batch), count=2)
    writer.flush()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"replica_00000_0000{i}.safetensors" for i in range(2)
    ]
    TeacherStore(tmp_path, **MADE).require(PROMPTS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 4}, ConfigError, "holds the 3 likeliest tokens, and teacher_topk is 4: .*Lower"),
        ({"temperature": 1.0}, ConfigError, "at temperature 1.5, and teacher_temperature is 1.0"),
        ({"tokenizer": "0" * 64}, DataError, "made with another tokenizer"),
    ],
)
def test_a_store_that_was_made_for_something_else_is_refused(folder, change: dict[str, Any], error, message):
    with pytest.raises(error, match=message):
        TeacherStore(folder, **MADE | change)


def test_a_response_without_an_answer_is_named(folder):
    with pytest.raises(DataError, match=r"no answer for 1 of 5 responses, the first is line 7: .*other rollouts"):
        TeacherStore(folder, **MADE).require([*PROMPTS, prompt(7, 1)])


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def begins(path: Path, name: str) -> int:
    """Where a tensor's bytes begin in a safetensors file."""
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    return 8 + header + json.loads(data[8 : 8 + header])[name]["data_offsets"][0]


@pytest.mark.parametrize("name", ["ids", "log_probs"])
def test_an_altered_answer_is_told_when_it_is_read_and_others_are_not(folder, name):
    (path,) = folder.iterdir()
    flip_a_bit(path, begins(path, name) + 4 * K + 1)  # the second token, of the second response
    opened = TeacherStore(folder, **MADE | {"k": 1})
    opened.read(PROMPTS[0])
    with pytest.raises(DataError, match=f"{path}: tokens 1 to 3 are not what was written"):
        opened.read(PROMPTS[1])


@pytest.mark.parametrize("name", ["offsets", "keys", "sums"])
def test_an_altered_index_is_told_when_the_store_is_opened(folder, name):
    (path,) = folder.iterdir()
    flip_a_bit(path, begins(path, name) + 8)
    with pytest.raises(DataError, match=f"{path} is not what was written: the sha256 of its index differs"):
        TeacherStore(folder, **MADE)


def test_altered_metadata_and_a_file_that_is_cut_off_are_told_when_the_store_is_opened(folder):
    (path,) = folder.iterdir()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"models/t", b"models/u"))
    with pytest.raises(DataError, match="the sha256 of its index differs"):
        TeacherStore(folder, **MADE)
    path.write_bytes(data[:-9])
    with pytest.raises(DataError, match=f"{path} cannot be read as a part"):
        TeacherStore(folder, **MADE)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_planted_pickle_in_place_of_a_part_never_runs(folder, tmp_path, kind):
    (path,) = folder.iterdir()
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    else:
        torch.save({"ids": Planted(tmp_path / "ran")}, path)
    with pytest.raises(DataError, match=f"{path} cannot be read as a part"):
        TeacherStore(folder, **MADE)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no .safetensors file"):
        TeacherStore(tmp_path, **MADE)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="is no part of a teacher's answers: .*got no metadata"):
        TeacherStore(tmp_path, **MADE)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="cannot be read as a part"):
        TeacherStore(tmp_path, **MADE)
