"""A Megatron that is not what the package knows is told apart by name and version, before anything is built."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training import training

from megatron_hybrid.errors import ConfigError, MegatronMismatch
from megatron_hybrid.mcore.symbols import (
    EXPECTED_PARAMETERS,
    ONLY_IN,
    PARSES_INSIDE,
    SEEN_VERSIONS,
    TAKES_CONFIG,
    TAKES_PROVIDER,
    asked_of,
    borrow,
    check_apex,
    check_megatron,
    check_parameters,
    generation,
    megatron_version,
)


def test_the_installed_megatron_is_what_the_package_knows():
    check_megatron()


def test_a_borrowed_symbol_is_megatrons_own_object():
    assert borrow("megatron.training.training", "pretrain") is training.pretrain


@pytest.mark.parametrize(("module", "name"), asked_of(TAKES_CONFIG))
def test_a_missing_symbol_is_told_with_its_path_and_both_versions(monkeypatch, module, name):
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(MegatronMismatch) as raised:
        check_megatron()
    text = str(raised.value)
    assert text.startswith(f"megatron-core {megatron_version()} has no {module}.{name} ")
    assert f"seen to work with megatron-core {SEEN_VERSIONS}: install that version" in text


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (("model_provider", "forward_step_func", "extra_args_provider=None"), PARSES_INSIDE),
        (("cfg_container", "model_provider", "forward_step_func"), TAKES_PROVIDER),
        (("cfg_container", "forward_step_func", "model_provider=None"), TAKES_CONFIG),
    ],
)
def test_a_generation_is_asked_for_what_it_has_in_the_place_of_the_others(monkeypatch, parameters, expected):
    monkeypatch.setattr(training, "pretrain", function("train_valid_test_dataset_provider", *parameters))
    assert generation() == expected
    for (module, name), generations in ONLY_IN.items():
        if expected not in generations:
            monkeypatch.delattr(importlib.import_module(module), name)
    check_megatron()
    module, name = asked_of(expected)[-1]
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(MegatronMismatch, match=f"has no {module}.{name} "):
        check_megatron()


def test_before_the_seam_a_model_must_make_its_logits_in_the_place_that_we_know(monkeypatch):
    old = function("train_valid_test_dataset_provider", "forward_step_func", "extra_args_provider=None")
    monkeypatch.setattr(training, "pretrain", old)
    monkeypatch.setattr(GPTModel, "_postprocess", lambda self: (self.post_process, self._scale_logits))
    with pytest.raises(MegatronMismatch, match="GPTModel._postprocess of .* does not use output_layer, through which"):
        check_megatron()


def test_a_missing_module_reads_like_a_missing_symbol():
    with pytest.raises(MegatronMismatch, match=r"has no megatron\.core\.moved_away\.thing \(No module named"):
        borrow("megatron.core.moved_away", "thing")


def test_a_mismatch_is_caught_as_an_import_error():
    with pytest.raises(ImportError):
        borrow("megatron.core", "no_such_name")


LOG_PARAMETERS = next(expected for _, name, expected in EXPECTED_PARAMETERS if name == "training_log")


@pytest.mark.parametrize("missing", LOG_PARAMETERS)
def test_a_log_without_a_parameter_we_read_is_refused(monkeypatch, missing):
    monkeypatch.setattr(training, "training_log", function(*(name for name in LOG_PARAMETERS if name != missing)))
    with pytest.raises(MegatronMismatch, match=f"training_log of megatron-core .* has no parameter {missing}, which"):
        check_megatron()


def test_a_pretrain_without_the_parameters_we_replace_is_refused(monkeypatch):
    monkeypatch.setattr(training, "pretrain", function("dataset_provider"))
    expected = "pretrain of .* has no parameter train_valid_test_dataset_provider, forward_step_func, which"
    with pytest.raises(MegatronMismatch, match=expected):
        check_megatron()


def test_a_model_without_an_output_processor_is_refused(monkeypatch):
    monkeypatch.setattr(GPTModel, "forward", function("self", "input_ids", "labels"))
    with pytest.raises(
        MegatronMismatch, match="GPTModel.forward .* has no parameter output_processor, output_processor"
    ):
        check_megatron()


@pytest.mark.parametrize("missing", ["post_process", "output_layer", "_scale_logits"])
def test_a_hybrid_model_that_we_cannot_reach_into_is_refused(monkeypatch, missing):
    used = [name for name in ("post_process", "output_layer", "_scale_logits") if name != missing]
    monkeypatch.setattr(HybridModel, "forward", eval(f"lambda self: ({', '.join(f'self.{name}' for name in used)})"))
    with pytest.raises(MegatronMismatch, match=f"HybridModel.forward of .* does not use {missing}, through which"):
        check_megatron()


def test_more_parameters_than_we_know_are_fine():
    check_parameters("f", function("learning_rate", "new_in_this_version"), ("learning_rate",))


def function(*parameters: str) -> Any:
    return eval(f"lambda {', '.join(parameters)}: None")


# The package on PyPI that has the name of NVIDIA's.


def install_apex(folder: Path, monkeypatch: Any, *, code: str = "", nvidia: bool = False) -> None:
    (folder / "apex").mkdir()
    (folder / "apex" / "__init__.py").write_text(code)
    if nvidia:
        (folder / "apex" / "multi_tensor_apply").mkdir()
        (folder / "apex" / "multi_tensor_apply" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("code", ["", "print 'Python 2'", "import a_web_framework", "raise RuntimeError"])
def test_the_unrelated_apex_is_refused_without_running_it(tmp_path, monkeypatch, code):
    install_apex(tmp_path, monkeypatch, code=code)
    with pytest.raises(ConfigError, match="not NVIDIA Apex: it has no apex.multi_tensor_apply.*pip uninstall apex"):
        check_megatron()


def test_an_apex_that_is_a_single_file_is_refused_too(tmp_path, monkeypatch):
    (tmp_path / "apex.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not NVIDIA Apex"):
        check_apex()


def test_nvidias_apex_passes(tmp_path, monkeypatch):
    install_apex(tmp_path, monkeypatch, nvidia=True)
    check_apex()
