"""Which backend serves an op: the choice, its scope, and what is said where there is none."""

import json
import subprocess
import sys

import pytest
import torch
from started import environment

from fastscore import ops
from fastscore.ops import backends, reference, use_backend

A, G = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(3)
ARGUMENTS = {
    "channel_sums": (A, G),
    "channel_dot": (A, G),
    "channel_powers": (A, G),
    "random_gradient": (IDS, 10, 5),
    "normalize_gradient": (G,),
    "clamp_backward_": (A, G.clone(), None, -0.5, 0.5),
}
FUNCTIONS = [op for op in ARGUMENTS if op != "clamp_backward_"]  # of fastscore.ops; clamp_backward has its own test


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the reference functions that ran, in order."""
    seen: list[str] = []

    def record(name, function):
        def run(*args, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)
        return run

    for name in ARGUMENTS:
        monkeypatch.setattr(reference, name, record(name, getattr(reference, name)))
    return seen


@pytest.fixture
def all_available(monkeypatch) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda name: "")


def dot() -> None:
    ops.channel_dot(A, G)


def test_clamp_backward_runs_the_reference(calls):
    native = ops.clamp_backward(A, G, A.cos(), -0.5, 0.5)
    with use_backend("reference"):
        chosen = ops.clamp_backward(A, G, A.cos(), -0.5, 0.5)
    assert calls == ["clamp_backward_", "channel_sums", "channel_sums"]
    torch.testing.assert_close(chosen, native, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_reference_serves_cpu_tensors_inside_the_block_alone(op, calls):
    native = getattr(ops, op)(*ARGUMENTS[op])
    assert calls == []
    with use_backend("reference"):
        chosen = getattr(ops, op)(*ARGUMENTS[op])
    assert op in calls
    torch.testing.assert_close(chosen, native, rtol=1e-5, atol=1e-5)
    before = len(calls)
    getattr(ops, op)(*ARGUMENTS[op])
    assert len(calls) == before


@pytest.mark.parametrize("inner", ["reference", "triton", "cuda"])
def test_choices_nest(inner, calls, all_available):
    with use_backend("reference"):
        dot()
        with use_backend(inner):
            dot()
        dot()
    dot()
    assert calls.count("channel_dot") == (3 if inner == "reference" else 2)


def test_an_exception_ends_the_choice(calls):
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    dot()
    assert calls == []


def test_every_op_has_a_kernel_for_gpus():
    """Native or Triton, without a GPU here."""
    for op in backends.FAMILIES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastscore::{op}", "CUDA")
    assert set(backends.FAMILIES) == set(ARGUMENTS)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_kernels_for_gpus_refuse_other_devices(op):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"Triton kernels run on GPUs, but a tensor is on cpu"):
        backends._lazy(op)(*ARGUMENTS[op])


def test_a_partner_on_another_device():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"a is on cpu and g is on meta; move one of them"):
        backends._lazy("channel_dot")(A, G.to("meta"))


def test_a_device_older_than_the_targets(monkeypatch):
    common = pytest.importorskip("fastscore.ops.triton.common")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RuntimeError, match=r"Tesla T4 \(cuda:0\) has compute capability 7\.5, but .* need 8\.0"):
        common.multiprocessors.__wrapped__(torch.device("cuda", 0))
    assert "8.0 (Ampere) or newer" in backends.unavailable("triton")


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"name is 'cpu', but has to be one of \('cuda', 'triton', 'composite', 'ref"):
        use_backend("cpu").__enter__()


@pytest.mark.parametrize(("name", "patch", "reason"), [
    ("cuda", (backends, "NATIVE_CUDA", False), "has no CUDA kernels: install a wheel that has"),
    ("triton", (backends.importlib.util, "find_spec", lambda name: None), "pip install triton"),
    ("triton", (torch.version, "cuda", None), "is built without CUDA: install a CUDA build of torch"),
    ("triton", (torch.cuda, "is_available", lambda: False), "finds no CUDA device: check the driver"),
])
def test_reasons(name, patch, reason, monkeypatch):
    if name == "triton" and patch[1] != "find_spec":
        pytest.importorskip("triton")  # without it, that is the reason
    if patch[1] == "is_available":
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(*patch)
    with pytest.raises(RuntimeError, match=rf"name is '{name}', which cannot be used here: .*{reason}"), \
            use_backend(name):
        pass


def test_rows_for_info():
    rows = {row.name: row for row in backends.backends()}
    assert list(rows) == ["cpu", "cuda", "triton", "composite", "reference"]
    assert (rows["cpu"].serves, rows["composite"].serves) == ("cpu", "every other device")
    assert all(row.unavailable == backends.unavailable(row.name) for row in rows.values())
    with use_backend("reference"):
        rows = {row.name: row for row in backends.backends()}
    assert (rows["reference"].serves, rows["cpu"].serves) == ("cpu, cuda", "")


ENVIRONMENTS = {  # driver, what the library needs, torch's CUDA and ROCm, Triton -> what serves GPUs, and why
    "a new driver": (13000, 13000, "13.0", None, True, "cuda", ""),
    "an old driver": (12080, 13000, "12.8", None, True, "triton", "and the driver is for CUDA 12.8: update the NVIDIA"),
    "nor Triton": (12080, 13000, "12.8", None, False, "composite", "built with CUDA 13, and the driver is for CUDA"),
    "an old library": (12080, 12040, "12.8", None, True, "cuda", ""),
    "ROCm": (0, 13000, None, "6.4", True, "triton", "is built for ROCm, whose devices run Triton's kernels"),
}


@pytest.fixture(scope="module")
def serving() -> dict[str, dict[str, str]]:
    """What serves GPUs in each environment, found in a process whose library has CUDA kernels; "imported": which of
    Triton's kernels came with fastscore."""
    facts: dict[str, dict[str, str]] = json.loads(run(f"""if True:
        import fastscore, importlib, json, sys, torch
        facts = {{"imported": {{name: "" for name in sys.modules if name.startswith("fastscore.ops.triton")}}}}
        from fastscore.ops import backends, library
        native = torch._C._dispatch_has_kernel_for_dispatch_key
        torch._C._dispatch_has_kernel_for_dispatch_key = lambda op, key: key == "CUDA" or native(op, key)
        for name, (driver, needs, cuda, hip, triton, *_) in {ENVIRONMENTS!r}.items():
            library.CUDA_RUNTIME, library.cuda_driver = needs, lambda: driver
            torch.version.cuda, torch.version.hip = cuda, hip
            sys.modules.pop("triton", None)
            if not triton:
                sys.modules["triton"] = None
            backends._defaults.clear()
            backends = importlib.reload(backends)
            table = torch._C._dispatch_dump_table("fastscore::channel_dot").splitlines()
            facts[name] = {{
                "chosen": backends.GPU_BACKEND, "plan": backends.serving(torch.device("cuda:0")),
                "kernel": next((row for row in table if row.startswith("CUDA:")), ""),
                "xpu": backends.serving(torch.device("xpu")), "why": backends.unavailable("cuda")}}
        print(json.dumps(facts))"""))
    return facts


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_serves_gpus_follows_what_can_run(name, serving):
    *_, chosen, why = ENVIRONMENTS[name]
    if chosen == "triton":
        pytest.importorskip("triton")
    facts = serving[name]
    assert facts["chosen"] == chosen
    assert facts["plan"].startswith(backends._NAMES[chosen])
    assert why in facts["plan"]
    assert why in facts["why"]
    assert ("backends.py" in facts["kernel"]) == (chosen != "cuda" or not backends.NATIVE_CUDA)
    assert facts["xpu"] == "operations of PyTorch in place of kernels: there is none for xpu"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=environment()).stdout


def test_kernels_are_not_imported_before_they_are_called(serving):
    assert serving["imported"] == {}


def test_without_triton():
    """Everything on the CPU works, and so does the choice of a launch; a GPU op says what is missing."""
    said = run("import sys; sys.modules['triton'] = None\n"
               "import torch, fastscore\n"
               "from fastscore.ops import backends\n"
               "from fastscore.ops.triton import launch\n"
               "print(launch.plan_channel_sums((2, 3, 4), (12, 4, 1), (12, 4, 1), 1, 4, 132).layout)\n"
               "x = torch.ones(1, 2, 3)\n"
               "print(fastscore.ops.channel_dot(x, x).tolist())\n"
               "try: backends._lazy('channel_dot')(x, x)\n"
               "except RuntimeError as error: print(error)\n")
    assert said == ("rows\n[[3.0, 3.0]]\n"
                    "fastscore::channel_dot on a GPU needs Triton or a native library with CUDA kernels: "
                    "pip install triton, or install a wheel that has them\n")
