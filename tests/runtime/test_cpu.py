"""The CUDA stand-ins: there while enabled, gone without a trace afterwards, and never where a GPU is."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.training import training

from megatron_hybrid.runtime import cpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def enabled():
    with cpu.enabled() as active:
        assert active
        yield


def attributes() -> dict[tuple[str, str], Any]:
    """Everything the stand-ins may touch: torch's namespaces and classes, and all of Megatron's."""
    owners: dict[str, Any] = {"torch": torch, "torch.cuda": torch.cuda, "torch.cuda.random": torch.cuda.random}
    owners |= {"Tensor": torch.Tensor, "Module": torch.nn.Module}
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and module is not None:
            owners[name] = module
            classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == name]
            owners |= {f"{name}.{c.__qualname__}": c for c in classes}
    return {(name, key): value for name, owner in owners.items() for key, value in list(vars(owner).items())}


def differences(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[tuple[str, str]]:
    return {key for key in before.keys() | after.keys() if before.get(key, cpu) is not after.get(key, cpu)}


def test_every_attribute_is_the_same_object_after_disable():
    with cpu.enabled():
        pass  # whatever Megatron loads late is there now
    before = attributes()
    with cpu.enabled():
        during = differences(before, attributes())
    assert differences(before, attributes()) == set()
    # The test sees what it should: factories, methods, the CUDA namespace and Megatron's own modules.
    touched = {("torch", "zeros"), ("Tensor", "cuda"), ("Module", "to"), ("torch.cuda", "current_device")}
    assert touched | {("megatron.training.training", "initialize_megatron")} <= during
    assert len(during) > 50


FRESH = """
import sys, types
import torch
was = {name: vars(torch)[name] for name in ("zeros", "load")}
from megatron_hybrid.runtime import cpu
assert not cpu.is_enabled() and "megatron.core" not in sys.modules
assert all(vars(torch)[name] is value for name, value in was.items())

cpu.enable()
cpu.disable()

def home(value):
    # Stand-ins wrap what they replace; their code still says where they were written.
    return value.__code__.co_filename if isinstance(value, types.FunctionType) else ""

left = []
for name, module in list(sys.modules.items()):
    if not isinstance(module, types.ModuleType) or name == cpu.__name__:
        continue
    for key, value in list(vars(module).items()):
        held = list(vars(value).items()) if isinstance(value, type) and value.__module__ == name else []
        for inner, found in [("", value), *held]:
            if home(found) == cpu.__file__ or (isinstance(found, type) and found.__module__ == cpu.__name__):
                left.append(f"{name}.{key}.{inner}")
print(sorted(left))
"""


def test_a_fresh_process_keeps_no_stand_in_and_an_import_changes_nothing():
    """Modules that are loaded by `enable` itself could catch a stand-in at their import and keep it for ever."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_enabling_twice_is_enabling_once():
    before = attributes()
    assert cpu.enable() and cpu.enable()
    assert cpu.is_enabled()
    cpu.disable()
    assert not cpu.is_enabled()
    assert differences(before, attributes()) == set()


def test_disable_without_enable_is_harmless():
    before = attributes()
    cpu.disable()
    assert differences(before, attributes()) == set()


def test_blocks_nest_and_only_the_outermost_undoes():
    with cpu.enabled():
        with cpu.enabled():
            pass
        assert cpu.is_enabled()
    assert not cpu.is_enabled()


def test_a_block_inside_an_enabled_program_leaves_it_enabled():
    cpu.enable()
    with cpu.enabled():
        pass
    assert cpu.is_enabled()
    cpu.disable()


def test_an_error_inside_the_block_undoes_it():
    with pytest.raises(KeyError), cpu.enabled():
        raise KeyError
    assert not cpu.is_enabled()


def test_a_failure_half_way_undoes_the_first_half(monkeypatch):
    def broken() -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr(cpu, "_run_fusers_uncompiled", broken)
    before = attributes()
    with pytest.raises(RuntimeError, match="half-way"):
        cpu.enable()
    assert not cpu.is_enabled()
    assert differences(before, attributes()) == set()


def test_with_a_gpu_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = attributes()
    assert cpu.enable() is False
    assert not cpu.is_enabled()
    with cpu.enabled() as active:
        assert active is False
        assert differences(before, attributes()) == set()


# While enabled.

FACTORIES = {
    "arange": (3,),
    "as_tensor": ([1.0],),
    "empty": (2,),
    "empty_like": (torch.ones(2),),
    "eye": (2,),
    "full": ((2,), 1.0),
    "full_like": (torch.ones(2), 1.0),
    "linspace": (0, 1, 3),
    "ones": (2,),
    "ones_like": (torch.ones(2),),
    "rand": (2,),
    "rand_like": (torch.ones(2),),
    "randint": (3, (2,)),
    "randn": (2,),
    "randn_like": (torch.ones(2),),
    "randperm": (3,),
    "tensor": ([1.0],),
    "zeros": (2,),
    "zeros_like": (torch.ones(2),),
}


def test_every_factory_is_tried_here():
    assert set(FACTORIES) == set(cpu._FACTORIES)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)], ids=str)
@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_asked_for_cuda_gives_a_cpu_tensor(enabled, name, device):
    assert getattr(torch, name)(*FACTORIES[name], device=device).device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers")
@pytest.mark.parametrize("name", ["zeros", "tensor", "ones_like"])
def test_only_while_enabled(name):
    with cpu.enabled():
        pass
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(torch, name)(*FACTORIES[name], device="cuda")


def test_tensors_and_modules_stay_on_the_cpu(enabled):
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor and module.cuda() is module
    for moved in (tensor.to("cuda"), tensor.to(device="cuda"), tensor.to(torch.device("cuda", 0), torch.float64)):
        assert moved.device.type == "cpu"
    assert tensor.to("cuda", torch.bfloat16).dtype == torch.bfloat16
    assert next(module.to("cuda").parameters()).device.type == "cpu"
    assert tensor.new_zeros(3, device="cuda").device.type == "cpu"
    assert tensor.new_tensor([1.0], device=torch.cuda.current_device()).device.type == "cpu"


def test_other_devices_are_still_honoured(enabled):
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.ones(2).to("meta").device.type == "meta"


def test_type_names_are_what_megatron_compares_with(enabled):
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(2).type(torch.float64).dtype == torch.float64


def test_a_checkpoint_mapped_to_cuda_is_read_on_the_cpu(enabled, tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", map_location="cuda:0")
    assert loaded["weight"].device.type == "cpu"


def test_streams_and_events_do_nothing(enabled):
    stream, event = torch.cuda.current_stream(), torch.cuda.Event(enable_timing=True)
    event.record(stream)
    stream.wait_event(event)
    stream.wait_stream(torch.cuda.Stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        pass
    assert event.query() and event.elapsed_time(event) == 0.0


def test_a_gpu_is_seen_only_while_megatron_initialises(enabled, monkeypatch):
    seen = []
    call = cpu._with_visible_gpu(lambda: seen.append((torch.cuda.is_available(), torch.cuda.device_count())))
    before = torch.cuda.is_available()
    call()
    assert seen == [(True, 1)]
    assert torch.cuda.is_available() is before is False
    assert training.initialize_megatron.__wrapped__ is not training.initialize_megatron


def test_a_gpu_is_out_of_sight_again_after_a_failed_initialisation(enabled):
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cpu._with_visible_gpu(fail)()
    assert not torch.cuda.is_available()


def test_no_fuser_is_left_compiled(enabled):
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    assert not hasattr(swiglu, "_torchdynamo_orig_callable")


# The random state.


@pytest.fixture
def tracker(enabled):
    """Megatron's tracker, empty, and forgotten afterwards."""
    megatron_random.initialize_rng_tracker(force_reset=True)
    yield megatron_random.get_cuda_rng_tracker()
    megatron_random.initialize_rng_tracker(force_reset=True)


def test_a_fork_draws_from_its_own_seed_and_leaves_the_outer_stream_alone(tracker):
    tracker.add("mine", 123)
    torch.manual_seed(7)
    outer = torch.rand(4)
    torch.manual_seed(7)
    with tracker.fork("mine"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(4), outer)
    with tracker.fork("mine"):
        second = torch.rand(3)
    expected = torch.rand(6, generator=torch.Generator().manual_seed(123))
    assert torch.equal(torch.cat([first, second]), expected)


def seeded(tp_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What rank `tp_rank` draws outside and inside its model-parallel fork."""
    megatron_random.model_parallel_cuda_manual_seed(1, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
    outside = torch.rand(4)
    with megatron_random.get_cuda_rng_tracker().fork():
        return outside, torch.rand(4)


def test_tensor_parallel_ranks_draw_alike_outside_and_differently_inside_a_fork(tracker):
    (outside_0, inside_0), (outside_1, inside_1) = seeded(0), seeded(1)
    assert torch.equal(outside_0, outside_1)
    assert not torch.equal(inside_0, inside_1)
    assert not torch.equal(inside_0, outside_0)
    assert torch.equal(seeded(1)[1], inside_1)


def test_the_cuda_state_is_the_cpus(enabled):
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


# One way to the device.


def test_nothing_but_the_cpu_runtime_asks_which_machine_this_is():
    """Code that asks takes another way on a GPU than the one that runs here, and no test of this machine sees it."""
    asked = {"is_cuda", "is_cpu", "is_available"}
    package = ROOT / "megatron_hybrid"
    allowed = Path(inspect.getfile(cpu))
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.attr}"
        for path in sorted(package.rglob("*.py"))
        if path != allowed
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in asked
    ]
    assert found == []
    source = ast.parse(allowed.read_text(encoding="utf-8"))
    assert [n for n in ast.walk(source) if isinstance(n, ast.Attribute) and n.attr == "is_available"]
