"""Numbers of which views and zeros are made in a branch that no example runs, however the code spells it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_way import noisy

import fastscore

FILE = """
import torch
from torch import nn

REST = -1


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.classifier = nn.Conv1d(3, 5, 1), nn.Conv1d(5, 6, 1), nn.Linear(6, 4)
        self.size, self.rest, self.rests = 6, -1, {{"few": -1}}

    def forward(self, x, rest=-1, state=None):
        if x.shape[-1] > 9:
            {longer}
        y = self.last(self.first(x).tanh()).mean(2, keepdim=True)
        return self.classifier({read})
"""
READ = {"view": "y.view(-1, SIZE)", "cut": "torch.cat([y, y.tanh()], 1)[:, :SIZE].flatten(1)"}
LONGER = {
    "view": "x = x.view(len(x), 3, -1, SIZE).mean(2)",
    "reshape(shape=)": "x = x.reshape(shape=(len(x), 3, -1, SIZE)).mean(2)",
    "torch.reshape(shape=)": "x = torch.reshape(x, shape=(len(x), 3, -1, SIZE)).mean(2)",
    "of sizes": "x = x.view((*x.shape[:2], -1, SIZE)).mean(2)",
    "added tuples": "x = x.view(x.shape[:2] + (-1, SIZE)).mean(2)",
    "unflatten": "x = x.unflatten(2, (-1, SIZE)).mean(2)",
    "unflatten(dim=, sizes=)": "x = x.unflatten(dim=2, sizes=(-1, SIZE)).mean(2)",
    "a file's": "x = x.view(len(x), 3, REST, SIZE).mean(2)",
    "an attribute": "x = x.view(len(x), 3, self.rest, SIZE).mean(2)",
    "an argument": "x = x.view(len(x), 3, rest, SIZE).mean(2)",
    "an item": "x = x.view(len(x), 3, self.rests['few'], SIZE).mean(2)",
    "as many as that divides": "x = x.view(len(x), 3, x.shape[-1] // SIZE, SIZE).mean(2)",
    "by a name": "count = x.shape[-1] // SIZE; x = x.view(len(x), 3, count, SIZE).mean(2)",
    "a name": "open = -1; x = x.view(len(x), 3, open, SIZE).mean(2)",
    "a tuple": "sizes = len(x), 3, -1, SIZE; x = x.view(sizes).mean(2)",
    "a size": "x = x.view(torch.Size([len(x), 3, -1, SIZE])).mean(2)",
    "less one": "x = x.view(len(x), 3, 0 - 1, SIZE).mean(2)",
    "a list times one": "sizes = [-1] * 1; x = x.view(len(x), 3, *sizes, SIZE).mean(2)",
    "unpacked from a name": "pair = -1, 1; open, one = pair; x = x.view(len(x), 3, open, SIZE).mean(2)",
    "unpacked": "sizes = [len(x), 3, -1]; x = x.view(*sizes, SIZE).mean(2)",
    "two sizes": "x = x * x.reshape(-1, SIZE).amax(1).mean()",
    "zeros": "x = torch.cat([x.new_zeros(len(x), 3, SIZE), x], 2)",
    "zeros by name": "sizes = len(x), 3, SIZE; x = torch.cat([torch.zeros(sizes, dtype=x.dtype), x], 2)",
    "zeros of added tuples": "x = torch.cat([torch.zeros(x.size()[:-1] + (SIZE,), dtype=x.dtype), x], 2)",
    "zeros(size=)": "x = torch.cat([torch.zeros(size=(len(x), 3, SIZE), dtype=x.dtype), x], 2)",
    "a number of zeros": "x = x + x.new_zeros(len(x), SIZE).numel()",
    "a pad": "pad = x.new_zeros(len(x), SIZE); x = torch.cat([x, pad[:, None].expand(-1, 3, -1)], 2)",
    "einops": "from einops import rearrange; x = rearrange(x, 'n c (w t) -> n c w t', t=SIZE).mean(2)"}


def points(folder: Path, read: str, longer: str, size: str) -> Any:
    """The class, of a file of its own."""
    text = FILE.format(read=READ[read], longer=longer).replace("SIZE", size)
    (folder / "points.py").write_text(text)
    spec = importlib.util.spec_from_file_location("points", folder / "points.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Points


def offered(kind: Any) -> set[str]:
    """The layers whose channels go; what is left makes of short and long clouds what it made beside zeros."""
    model = noisy(kind)
    x, longer = (torch.randn(3, 3, count, generator=torch.Generator().manual_seed(0)).double() for count in (7, 12))
    scores = fastscore.score(model, [x], progress=False)
    options = {"scope": "layer", "compensate": False}
    small = fastscore.prune(model, scores, x, channels=0.5, **options).model
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, **options):
        for each in (x, longer):
            torch.testing.assert_close(small(each), model(each), rtol=1e-9, atol=1e-9)
    return set(scores)


@pytest.mark.parametrize("size", ["self.size", "6"])
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("how", LONGER)
def test_they_stay(how: str, read: str, size: str, tmp_path: Path) -> None:
    if how == "einops":
        pytest.importorskip("einops")
    assert offered(points(tmp_path, read, LONGER[how], size)) == {"first"}


GO = {"a state": ("view", "state = x.new_zeros(len(x), SIZE); x = x + state.sum()"),
      "a state behind layers": ("cut", "state = x.new_zeros(1, SIZE); x = x + state.sum()"),
      "a state of places": ("cut", "state = torch.zeros((len(x), SIZE, 4), dtype=x.dtype); x = x + state.sum()"),
      "two states": ("view", "state, rest = (x.new_zeros(1, SIZE).to(x), torch.zeros(1, SIZE)); x = x + state.sum()"),
      "a state with a size of one": ("cut", "state = x.new_zeros(len(x), SIZE) if state is None else "
                                     "state.unflatten(-1, (1, SIZE)).squeeze(1); x = x + state.sum()"),
      "a size of one": ("view", "x = x.unflatten(-1, (1, x.shape[-1])).squeeze(2)")}


@pytest.mark.parametrize("size", ["self.size", "6"])
@pytest.mark.parametrize("how", GO)
def test_they_go(how: str, size: str, tmp_path: Path) -> None:
    assert offered(points(tmp_path, *GO[how], size)) == {"first", "last"}
