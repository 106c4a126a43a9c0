"""What runs a model while it is timed: PyTorch on the model's device, or the runtime on which it will be deployed."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastscore.arguments import needed
from fastscore.batches.calls import Forward
from fastscore.batches.outputs import OneTensor
from fastscore.batches.parts import Batch
from fastscore.modules.inspection import device_of

Clock = Literal["torch", "onnxruntime", "openvino"]
Call: TypeAlias = Callable[[], object]
_PACKAGES = {"torch": (), "onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}


def check(clock: str, latency: float | None, model: nn.Module, example_inputs: Batch) -> None:
    """Raise ValueError for an unknown clock, one without a budget to measure, or a model or inputs that it does not
    take; ImportError without it."""
    if clock not in get_args(Clock):
        raise ValueError(f"clock: {clock!r} is none of {', '.join(get_args(Clock))}")
    if clock == "torch":
        return
    if latency is None:
        raise ValueError(f"clock: {clock!r} measures a budget in time, which latency= is: give both or neither")
    for package in _PACKAGES[clock]:
        needed(package, f"clock: {clock} needs {package}", f"'torch-fastscore[{clock}]'")
    if not isinstance(example_inputs, Tensor):
        raise ValueError(f"clock: {clock} runs models of one tensor, and example_inputs are "
                         f"{type(example_inputs).__name__}: give a tensor, or clock=\"torch\"")
    if device_of(model).type != "cpu":
        raise ValueError(f"clock: {clock} runs on the CPU here, and the model is on {device_of(model)}: move it there "
                         "(model.cpu()), or give clock=\"torch\"")


def runner(clock: Clock, model: nn.Module, example_inputs: Batch, forward: Forward) -> Call:
    """One call of `model`, in evaluation mode, on the example inputs, by this clock's runtime; see `check`."""
    made = partial(forward, model, example_inputs)
    return made if clock == "torch" else _RUNTIMES[clock](OneTensor(model, forward).eval(), example_inputs)


def _onnxruntime(model: nn.Module, x: Tensor) -> Call:
    """As fastscore.save exports it. Threads wait without spinning, which would slow down the model whose turn it is."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, input_names=["input"], verbose=False)
    assert program is not None
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session: Any = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options,
                                                providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"input": x.numpy()})


def _openvino(model: nn.Module, x: Tensor) -> Call:
    """In the precision that OpenVINO chooses for this CPU, bfloat16 where it has instructions for it."""
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted: Any = openvino.convert_model(torch.export.export(model, (x,)))
    compiled = openvino.Core().compile_model(converted, "CPU", {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return partial(compiled.create_infer_request().infer, [x.numpy()])


_RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino}
