"""score() on a device that has no kernel: the path of a GPU with operations of PyTorch in their place."""

import json
import subprocess
import sys

import pytest
import torch
from networks import NETWORKS
from started import environment
from thinned import thinned

import fastscore


@pytest.mark.parametrize(("name", "importance"), thinned(
    ["residual", "mobile", "squeeze-excite"], ["taylor", "taylor-sq"]))
def test_scores_without_kernels(name: str, importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]
    model, batches = network.model().float(), [network.inputs().float()]
    own = fastscore.score(model, batches, importance=importance, progress=False)
    monkeypatch.setenv("FASTSCORE_PORTABLE", "1")
    with fastscore.ops.use_backend("composite"):
        without = fastscore.score(model, batches, importance=importance, progress=False)
    assert own.plan is not None
    assert without.plan is not None
    assert "measured by CPU kernels" in str(own.plan)
    assert "measured by operations of PyTorch in place of kernels: chosen by use_backend()" in str(without.plan)
    for layer in own:
        torch.testing.assert_close(without[layer], own[layer], rtol=1e-3, atol=1e-6 * float(own[layer].max()))


CODE = """
import json
import other_device, torch
import torch.nn.functional as F
from networks import NETWORKS
import fastscore
options = [{}, {"importance": "taylor"}, {"probes": 2, "center": True}, {"distribution": "orthogonal", "probes": 3},
           {"ablation": "mean"}, {"reduction": "element"}, {"importance": "molchanov-group"},
           {"importance": "bn-scale"}, {"importance": "magnitude-l2"},
           {"gradient": "loss", "loss": lambda output, batch: F.mse_loss(output, 0 * output)}]
worst, plan = {}, ""
for name in ("residual", "mobile", "squeeze-excite"):
    network = NETWORKS[name]
    model, elsewhere = network.model().float(), network.model().float().to("other")
    batches = [network.inputs().float()]
    for each in options if name == "residual" else options[:1]:
        own = fastscore.score(model, batches, progress=False, **each)
        there = fastscore.score(elsewhere, batches, progress=False, **each)
        worst[f"{name} {each}"] = max(float((own[x] - there[x].cpu()).abs().max() / own[x].abs().max()) for x in own)
        plan = plan or str(there.plan)
network = NETWORKS["residual"]
batches = [network.inputs().float()]
sizes, outputs, repaired = [], [], []
for device in ("cpu", "other"):
    dense = network.model().float().to(device)
    scores = fastscore.score(dense, batches, progress=False)
    result = fastscore.prune(dense, scores, batches[0], channels=0.6, progress=False)
    small = result.model
    sizes.append(sum(each.numel() for each in small.parameters()))
    outputs.append(small.eval()(batches[0].to(device)).detach().cpu())
    better = fastscore.reconstruct(dense, result, [batches[0].to(device)], progress=False).model
    repaired.append(better.eval()(batches[0].to(device)).detach().cpu())
torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-5)
torch.testing.assert_close(repaired[1], repaired[0], rtol=1e-2, atol=1e-3)
print(json.dumps({"worst": worst, "ops": sorted(other_device.OPS_OF_FASTSCORE), "plan": plan,
                  "sizes": sizes, "device": str(next(small.parameters()).device)}))
"""


def test_a_device_without_kernels_and_float64() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=environment())
    assert run.returncode == 0, run.stderr[-3000:]
    facts = json.loads(run.stdout.splitlines()[-1])
    assert max(facts["worst"].values()) < 1e-4, facts["worst"]
    assert facts["ops"] == ["channel_powers", "channel_sums", "clamp_backward_", "normalize_gradient",
                            "random_gradient"]
    assert "measured by operations of PyTorch in place of kernels: there is none for other" in facts["plan"]
    assert facts["device"] == "other:0"
    assert facts["sizes"][0] == facts["sizes"][1]
