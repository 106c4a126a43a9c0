"""Models of samples that lie one after the other in a batch, each with as many rows as it holds; and such batches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


def pooled(how: str, x: Tensor, of: Tensor, samples: int) -> Tensor:
    at = of[:, None].expand_as(x)
    return x.new_zeros(samples, x.shape[1]).scatter_reduce(0, at, x, how, include_self=False)


class Graphs(nn.Module):
    """Messages along edges, and a pooling of each graph's nodes."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool, self.first, self.second = pool, nn.Linear(5, 8), nn.Linear(8, 9)
        self.head, self.last = nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, edge_index: Tensor, ptr: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            h = layer(x)
            x = torch.relu(h + torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]]))
        of = torch.bucketize(torch.arange(len(x)), ptr[1:], right=True)
        return self.last(torch.relu(self.head(pooled(self.pool, x, of, len(ptr) - 1))))


class Packed(nn.Module):
    """Attention of tokens within their own sequence, and a head for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(20, 8), nn.ModuleList(nn.Linear(8, 8) for _ in "qkv"), \
            nn.Linear(8, 8)
        self.norm, self.up, self.down, self.head = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (layer(x) for layer in self.qkv)
        ends = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
        x = x + self.out(torch.cat([(q[a:b] @ k[a:b].T / 8**0.5).softmax(-1) @ v[a:b] for a, b in ends]))
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(torch.stack([x[a:b].mean(0) for a, b in ends]))


class Cloud(nn.Module):
    """Points, and the cloud of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)
        self.head, self.last = nn.Linear(10, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.last(torch.relu(self.head(pooled("amax", x, batch, int(batch.max()) + 1))))


class Molecules(nn.Module):
    """Atoms that are embedded, and edges with features of their own, in two rounds of the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.atom = nn.Embedding(9, 8)
        self.edge = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 8))
        self.update = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8))
        self.read = nn.Sequential(nn.Linear(8, 11), nn.ReLU(), nn.Linear(11, 2))

    def forward(self, z: Tensor, edge_index: Tensor, edge_attr: Tensor, ptr: Tensor) -> Tensor:
        x, e = self.atom(z), self.edge(edge_attr)
        for _ in range(2):
            x = x + self.update(torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]] * e))
        of = torch.bucketize(torch.arange(len(z)), ptr[1:], right=True)
        made = self.read(x)
        return made.new_zeros(len(ptr) - 1, made.shape[1]).index_add(0, of, made)


def parts(kind: str, sizes: Sequence[int], seed: int = 0) -> list[Batch]:
    """Samples of these sizes, each a batch of its own."""
    random, made = torch.Generator().manual_seed(seed), []
    for nodes in sizes:
        edges = torch.randint(0, max(nodes, 1), (2, 2 * nodes), generator=random)
        ends = torch.tensor([0, nodes])
        x = torch.randn(nodes, 5, generator=random, dtype=torch.float64)
        made.append({"x": x, "edge_index": edges, "ptr": ends} if kind in ("sum", "mean", "amax") else
                    {"ids": torch.randint(0, 20, (nodes,), generator=random), "cu_seqlens": ends}
                    if kind == "packed" else {"x": x, "batch": torch.zeros(nodes, dtype=torch.long)}
                    if kind == "cloud" else
                    {"z": torch.randint(0, 9, (nodes,), generator=random), "edge_index": edges, "ptr": ends,
                     "edge_attr": torch.randn(2 * nodes, 4, generator=random, dtype=torch.float64)})
    return made


def joined(samples: Sequence[Batch]) -> Batch:
    """As data loaders of graphs put samples together."""
    made: dict[str, list[Tensor]] = {name: [] for name in samples[0]}
    rows = 0
    for number, sample in enumerate(samples):
        for name, value in sample.items():
            ends = name in ("ptr", "cu_seqlens")
            shift = rows if ends or name == "edge_index" else number if name == "batch" else 0
            made[name].append(value[int(ends and number > 0):] + shift if shift else value[int(ends and number > 0):])
        rows += len(next(iter(sample.values())))
    return {name: torch.cat(values, int(name == "edge_index")) for name, values in made.items()}


KINDS: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: Graphs("sum"), "mean": lambda: Graphs("mean"), "amax": lambda: Graphs("amax"), "packed": Packed,
    "cloud": Cloud, "molecules": Molecules}
SIZES = ((4, 6, 3), (1, 5), (2, 2, 1, 7))
