"""Random networks that know their own channels: the generator follows every channel through every step it writes."""

import random
from collections.abc import Callable
from typing import Any

import torch
from networks import randomize
from random_adapted import Adapted
from random_experts import Experts
from random_heads import Attentions
from random_kinds import Kinds
from random_layers import Layers
from random_mixers import Mixers
from random_program import SIZE, Program, RandomNetwork, Step, Value, equal_parts
from random_steps import Steps
from random_views import Views
from torch import Tensor, nn


def generate(seed: int, length: int | None = None, more: bool = False, kinds: bool = False,
             alike: bool = False, views: bool = False, attentions: bool = False, adapted: bool = False,
             experts: bool = False) -> RandomNetwork:
    """The network of this seed, always the same. more: of the steps of random_layers, too. kinds: of those of
    random_kinds and random_mixers. alike: code between two layers takes the widths of both to be the same. views:
    of those of random_views. attentions: of those of random_heads. adapted: of those of
    random_adapted. experts: of those of random_experts."""
    return _Generator(seed, more, kinds, alike, views, attentions, adapted, experts).build(length)


class _Generator(Steps, Layers, Kinds, Mixers, Views, Attentions, Adapted, Experts):
    def __init__(self, seed: int, more: bool = False, kinds: bool = False, alike: bool = False,
                 views: bool = False, attentions: bool = False, adapted: bool = False,
                 experts: bool = False) -> None:
        self.seed, self.rng, self.more, self.with_kinds = seed, random.Random(seed), more, kinds
        self.alike, self.with_views, self.with_attentions, self.with_adapted = alike, views, attentions, adapted
        self.with_experts = experts
        self.parent: list[int] = []
        self.steps: list[Step] = []
        self.layers: dict[str, nn.Module] = {}
        self.values = [Value(self.new_labels(3), SIZE)]

    # units, by union and find

    def new_labels(self, count: int) -> list[int]:
        self.parent += range(len(self.parent), len(self.parent) + count)
        return list(range(len(self.parent) - count, len(self.parent)))

    def unit(self, label: int) -> int:
        while self.parent[label] != label:
            label = self.parent[label]
        return label

    def tie(self, *lists: list[int]) -> None:
        for labels in zip(*lists, strict=True):
            for other in labels[1:]:
                self.parent[self.unit(labels[0])] = self.unit(other)

    # the program

    def add(self, name: str, sources: tuple[int, ...], labels: list[int], size: int, run: Callable[..., Tensor],
            layer: nn.Module | str | None = None, fresh: bool = False, **notes: Any) -> int:
        """A step; notes: its `ties`, `onward`, `reads`, `makes` and `fixes`."""
        for source in sources:
            self.values[source].fresh = False
        key = layer if isinstance(layer, str) else None
        if isinstance(layer, nn.Module):
            key = f"{name}{len(self.layers)}"
            self.layers[key] = layer
        self.steps.append(Step(name, sources, run, key, **notes))
        self.values.append(Value(labels, size, fresh))
        return len(self.values) - 1

    def call(self, name: str, source: int, out: list[int], size: int, layer: nn.Module | str, sections: int = 1) -> int:
        """A step that calls a layer which reads one value and makes another."""
        labels = self.values[source].labels
        return self.add(name, (source,), out, size, lambda layer, x: layer(x), layer, fresh=True, reads=labels,
                        makes=out, ties=[equal_parts(labels, sections), equal_parts(out, sections)])

    def pick(self, where: Callable[[Value], bool] = lambda value: True) -> int | None:
        """A value, a recent one more often than an old one."""
        candidates = [i for i, value in enumerate(self.values) if i and not value.dead and where(value)]
        if not candidates:
            return None
        return candidates[max(self.rng.randrange(len(candidates)) for _ in range(3))]

    def pair(self) -> tuple[int, int] | None:
        """Two values of one shape; now and then one twice."""
        first = self.pick()
        if first is None:
            return None
        value = self.values[first]
        other = self.pick(lambda o: (len(o.labels), o.size) == (len(value.labels), value.size)
                          and (o is not value or self.rng.random() < 0.2))
        return None if other is None else (first, other)

    def head(self) -> int:
        """The output: logits behind a mean or a flatten, or an image."""
        source = self.pick()
        assert source is not None
        value = self.values[source]
        way = self.rng.choice(("mean", "mean", "flatten", "image"))
        if way == "image":
            index = self.conv(source, 2)
            assert index is not None
            return index
        labels = value.labels
        if way == "mean":
            flat = self.add("mean", (source,), labels, 1, lambda x: x.mean((2, 3)))
        else:
            labels = [label for label in labels for _ in range(value.size ** 2)]
            flat = self.add("flatten", (source,), labels, 1, lambda x: x.flatten(1))
        out = self.new_labels(self.rng.choice((5, 1)) if self.with_kinds else 5)  # classes, or a value
        return self.add("linear", (flat,), out, 1, lambda layer, x: layer(x), nn.Linear(len(labels), len(out)),
                        reads=labels, makes=out)

    def build(self, length: int | None) -> RandomNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.conv(0)
            options = dict(self.common())
            options |= self.own_layers() if self.more else {}
            options |= {**self.kinds(), **self.mixers()} if self.with_kinds else {}
            options |= dict(self.views()) if self.with_views else {}
            options |= dict(self.attentions()) if self.with_attentions else {}
            options |= dict(self.adapted()) if self.with_adapted else {}
            options |= dict(self.experts()) if self.with_experts else {}
            options |= {self.as_wide: 12} if self.alike else {}
            for step in self.rng.choices(list(options), list(options.values()), k=length or self.rng.randrange(4, 14)):
                step()
            output = self.head()
            self.output_labels = self.values[output].labels
            live = self.steps_behind(output)
            dead = [step for i, step in enumerate(self.steps) if i not in live]
            if self.seed % 5:
                output = self.drop(dead, output)
            order = sorted({step.layer for step in self.steps if step.layer})
            self.rng.shuffle(order)
            model = Program(self.steps, {name: self.layers[name] for name in order}, output)
            randomize(model).double().eval()
        producers: dict[str, list[int]] = {}
        consumers: dict[str, list[int]] = {}
        in_vain = [step for step in self.steps if any(step is other for other in dead)]
        for step in [*(step for step in self.steps if not any(step is other for other in dead)), *in_vain]:
            for name, reads, makes in (("", step.reads, step.makes), *step.within):
                for known, labels in ((consumers, reads), (producers, makes)):
                    if labels is not None:
                        first = known.setdefault(f"layers.{step.layer}{name}", labels)
                        step.ties.append((first, labels))
            made = 1 + next(i for i, each in enumerate(self.steps) if each is step)
            taken = made == output or any(made in each.sources for each in self.steps)
            for ties in [*step.ties, *(step.onward if taken else [])]:
                self.tie(*ties)
        fixed = [label for step in self.steps for label in [*step.fixes, *step.alike]]
        if self.seed % 5 == 0:  # what runs to no end
            fixed += [label for step in dead for source in step.sources for label in self.values[source].labels]
            fixed += [label for step in dead for label in consumers.get(f"layers.{step.layer}", [])]
            fixed += [label for step in dead for _, reads, makes in step.within for label in [*(reads or []), *makes]]

        def units(labels: list[int]) -> list[int]:
            return [self.unit(label) for label in labels]

        norms = {f"layers.{step.layer}": units(step.counts) for step in self.steps if step.counts}
        norms |= {f"layers.{step.layer}{step.counts_within[0]}": units(step.counts_within[1]) for step in self.steps
                  if step.counts_within}
        stays = [label for step in self.steps for label in step.stays]
        return RandomNetwork(self.seed, model, {name: units(labels) for name, labels in producers.items()},
                             {name: units(labels) for name, labels in consumers.items()},
                             set(units(self.values[0].labels + self.output_labels + stays)), set(units(fixed)),
                             [step.name for step in self.steps], norms,
                             [set(units(step.alike)) for step in self.steps if step.alike])

    def steps_behind(self, output: int) -> set[int]:
        """The steps on which the output depends; what is written in place depends on all that came before."""
        behind, work = set[int](), [output]
        while work:
            index = work.pop()
            if index and index - 1 not in behind:
                behind.add(index - 1)
                work += self.steps[index - 1].sources
        return behind

    def drop(self, dead: list[Step], output: int) -> int:
        """Leave steps out; the number of the output afterwards."""
        number, kept = {0: 0}, []
        for i, step in enumerate(self.steps):
            if not any(step is other for other in dead):
                step.sources = tuple(number[source] for source in step.sources)
                kept.append(step)
                number[i + 1] = len(kept)
        self.steps = kept
        return number[output]
