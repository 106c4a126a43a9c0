"""What benchmarks measure memory and steps by, and the allocator's settings that they start with."""

import subprocess
import sys

import pytest
import torch
from started import environment
from tasks import wide

import fastscore
from benchmarks import machine
from benchmarks.passes import memory, training_step
from benchmarks.peers.contestants import CONTESTANTS
from benchmarks.peers.measure import PeakBytes


def test_peak_counts_what_lives_at_once():
    kept = torch.empty(10**6)
    with PeakBytes() as peak:
        a, b = torch.empty(1000), torch.empty(2000)
        del a
        c = torch.empty(500)
        del b, c
        d = torch.empty(2900)
    assert peak.bytes == 4 * 3000
    assert len(kept) + len(d) == 10**6 + 2900


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_peak_counts_weights_laid_out_for_onednn():
    weight = torch.randn(64, 64, 3, 3)
    with PeakBytes() as peak:
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, [2, 64, 8, 8])
        del packed
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, [2, 64, 8, 8])
    assert packed.is_mkldnn
    assert 4 * weight.numel() <= peak.bytes <= 2.1 * 4 * weight.numel()


def test_malloc_settings_are_one_set_or_none(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    kept, default = machine.malloc_environment("keep"), machine.malloc_environment("default")
    assert kept.items() >= machine.ALLOCATORS["keep"].items()
    assert not {"MALLOC_ARENA_MAX", *machine.ALLOCATORS["keep"]} & default.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_settle_starts_again_with_the_settings():
    code = ("import argparse; from benchmarks import machine; parser = argparse.ArgumentParser(); "
            "machine.add_arguments(parser); machine.settle(parser.parse_args()); print(machine.malloc())")
    done = subprocess.run([sys.executable, "-c", code, "--threads", "1"], env=environment(MALLOC_ARENA_MAX="3"),
                          capture_output=True, text=True, check=True)
    assert "MALLOC_MMAP_MAX_=0" in done.stdout
    assert "ARENA" not in done.stdout


def test_memory_of_a_pass_and_of_a_call():
    task = wide(64)
    plain = memory.growth(CONTESTANTS[memory.PLAIN], task)
    activations = sum(6 * 64 * side**2 * 4 for side in (10, 10, 8, 8, 6, 6))
    assert activations < plain["pass alone"]["tensors"] < 10 * activations
    assert plain["pass alone"]["tensors"] == pytest.approx(plain["whole call"]["tensors"], rel=0.01)
    ours = memory.growth(CONTESTANTS["fastscore, random"], task)
    folded = 4 * (task.model[0].weight.numel() + task.model[3].weight.numel())  # the copy's own weights
    assert activations / 4 < ours["pass alone"]["tensors"] < ours["whole call"]["tensors"] - folded


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_is_that_of_the_block():
    kept = torch.ones(2**24)
    with memory.PeakResident() as peak:
        block = torch.ones(2**25)
        del block
    assert peak.bytes == pytest.approx(2**27, rel=0.1)
    assert len(kept) == 2**24


def test_steps_with_and_without_a_scorer():
    task = wide()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    train = training_step.training_step(task.model, task.images, task.labels)
    scorer = fastscore.Scorer(task.model, task.graph)
    without, scored = training_step.alternate(train, scorer, rounds=2, steps=3, device="cpu")
    assert len(without) == len(scored) == 2
    assert scorer.scores().samples == 3 * 3 * len(task.images)  # the warm-up too
    assert not any(module._forward_pre_hooks for module in task.model.modules())
    assert not torch.equal(before["0.weight"], task.model[0].weight)


def test_taps_of_small_layers():
    taps, cost, plain = training_step.per_tap(5, rounds=1, steps=1, device="cpu")
    assert taps == 4
    assert len(cost) == len(plain) == 1
