"""What `import fastscore` takes along: PyTorch and Torch-Pruning, and no library that few calls need."""

import subprocess
import sys

HEAVY = {"torchvision", "transformers", "matplotlib", "pandas", "onnx", "onnxruntime", "openvino", "PIL",
         "torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "triton", "sympy"}


def test_import_takes_no_library_along_that_few_calls_need() -> None:
    """But for timm, and all that it takes along, which Torch-Pruning imports where it is installed."""
    code = f"import sys; sys.modules['timm'] = None; import fastscore; print(*{HEAVY} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert ran.stdout.split() == []
