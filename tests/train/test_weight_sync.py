"""Runs that share a folder for weights do not take each other's."""

from __future__ import annotations

from megatron_hybrid.train.weight_sync import weights_folder


def test_runs_that_share_a_folder_have_places_of_their_own_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [weights_folder(run_dir, "shared") for run_dir in ("one/hybrid", "two/hybrid", "two/hybrid-2")]
    for place in places:
        assert (tmp_path / "shared") in place.parents
        assert not [other for other in places if other != place and other in place.parents]
    assert len(set(places)) == 3
    assert weights_folder(tmp_path / "one" / "hybrid", "shared") == places[0], "a restart empties what it left"


def test_without_one_they_lie_beside_the_report(tmp_path):
    assert weights_folder(tmp_path, None) == tmp_path / "rollout_weights"
