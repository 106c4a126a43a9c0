"""Attention of two kinds of tokens together, as in Stable Diffusion 3 and Flux: each has projections of its own."""

from pathlib import Path

import pytest
import torch
import whole_way
from torch import Tensor, nn

DIM, HEADS, WIDTH = 10, 4, 3


class Joint(nn.Module):
    """Image and text attend to all tokens of both; the text's are not read where it is the last block."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.heads = HEADS
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            self.add_module(name, nn.Linear(DIM, HEADS * WIDTH))
        self.norm_q = nn.RMSNorm(WIDTH)  # of each head by itself
        self.to_out = nn.ModuleList([nn.Linear(HEADS * WIDTH, DIM), nn.Dropout(0.0)])
        self.to_add_out = None if last else nn.Linear(HEADS * WIDTH, DIM)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = (torch.cat([own(image), added(text)], 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for own, added in ((self.to_q, self.add_q_proj), (self.to_k, self.add_k_proj),
                                      (self.to_v, self.add_v_proj)))
        read = ((self.norm_q(q) @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        image_read, text_read = read.split([image.shape[1], text.shape[1]], 1)
        return self.to_out[0](image_read), None if self.to_add_out is None else self.to_add_out(text_read)


class Model(nn.Module):
    """The first half of the tokens is an image, the rest a text."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.image, self.text, self.head = nn.Linear(4, DIM), nn.Linear(4, DIM), nn.Linear(DIM, 3)
        self.joint = Joint(last)

    def forward(self, x: Tensor) -> Tensor:
        image, text = self.image(x[:, :3]), self.text(x[:, 3:])
        y, z = self.joint(image, text)
        z = text if z is None else text + z.tanh()
        return self.head(image + y).mean(1) + self.head(z).mean(1)


@pytest.mark.parametrize("last", [False, True])
def test_whole_way(last: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1)).double()
    joint = whole_way.check(lambda: Model(last), x, ["image", "joint.to_q"], tmp_path).model.joint
    assert (joint.heads, joint.add_v_proj.out_features, joint.to_out[0].in_features) == (2, 6, 6)
    assert last or joint.to_add_out.in_features == 6
