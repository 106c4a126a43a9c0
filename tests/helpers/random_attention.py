"""PyTorch's own attention in random networks: pixels are tokens, and a memory may be of another width."""

import torch.nn.functional as F
from random_kinds import Gated
from torch import Tensor, nn

HEADS = 2


class Attend(Gated):
    """Pixels ask each other, or those of a memory."""

    def __init__(self, width: int, memory: int | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, HEADS, kdim=memory, vdim=memory, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """[N, C, H, W], [N, M, H', W'] -> [N, C, H, W]."""
        query = x.flatten(2).transpose(1, 2)
        read = query if memory is None else memory.flatten(2).transpose(1, 2)
        made = self._by_definition(query, read) if self.gates else self.attn(query, read, read, need_weights=False)[0]
        return made.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])

    def names(self) -> list[str]:
        """The weights of queries, keys and values."""
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return ["in_proj_weight"] * 3 if self.attn.in_proj_weight is not None else list(names)

    def _by_definition(self, query: Tensor, read: Tensor) -> Tensor:
        def product(x: Tensor, name: str, weight: Tensor, bias: Tensor) -> Tensor:
            return F.linear(self.through(name, x), weight, bias)

        names, attn = self.names(), self.attn
        weights = attn.in_proj_weight.chunk(3) if names[0] == names[1] else [getattr(attn, name) for name in names]
        q, k, v = (product(x, *each).unflatten(-1, (HEADS, -1)).transpose(1, 2) for x, *each in
                   zip((query, read, read), names, weights, attn.in_proj_bias.chunk(3), strict=True))
        heads = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return product(heads, "out_proj", attn.out_proj.weight, attn.out_proj.bias)
