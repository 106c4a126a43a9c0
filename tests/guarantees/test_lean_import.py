"""What `import fastscore` takes along: PyTorch and Torch-Pruning, and no library that few calls need; and what a call
does."""

import subprocess
import sys

import torch
import torch.nn.functional as F
from started import environment
from torch import Tensor, nn

import fastscore
from fastscore.modules.operations_run import OperationsRun

HEAVY = {"torchvision", "transformers", "matplotlib", "pandas", "onnx", "onnxruntime", "openvino", "PIL",
         "torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "triton", "sympy"}


def test_import_takes_no_library_along_that_few_calls_need() -> None:
    """But for timm, and all that it takes along, which Torch-Pruning imports where it is installed."""
    assert heavy_after("import fastscore") == set()


def test_a_pruned_network_took_no_compiler_along() -> None:
    """torch._dynamo, which takes longer to import than a small network to be traced, scored, pruned and repaired."""
    assert heavy_after("""if True:
        import fastscore, torch
        from networks import NETWORKS
        model, images = NETWORKS["residual"].model(), NETWORKS["residual"].inputs(8)
        scores = fastscore.score(model, [images], progress=False)
        fastscore.prune(model, scores, images[:1], macs=0.6, calibration=[images])
        with fastscore.mask(model, scores, 0.3, images[:1]):
            model(images)""").isdisjoint({"torch._dynamo", "torch._inductor"})


def heavy_after(code: str) -> set[str]:
    """Those of HEAVY that a process holds that has run it."""
    code += f"\nimport sys; print(*{HEAVY} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300,
                         env=environment())
    return set(ran.stdout.split())


class Compiled(nn.Module):
    """A function of its code is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.relu = torch.compile(F.relu, backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.relu(self.b(self.relu(self.a(x)))))


def test_what_sees_operations_is_not_compiled_where_a_model_compiles() -> None:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    assert list(fastscore.score(Compiled(), [torch.randn(4, 5)], progress=False)) == ["a", "b"]
    assert not _debug_get_cache_entry_list(OperationsRun.__torch_dispatch__.__code__)
