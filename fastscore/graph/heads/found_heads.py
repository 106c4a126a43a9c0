"""What is known of a model's attention heads."""

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from fastscore.graph.groups import TIED, ChannelGroup


@dataclass
class Found:
    """What there is in a model: groups of heads; the name of each other one -> why it is kept; head dimensions, which
    can go in the place of whole heads; the name of those that have none -> why; of those that have some -> why they do
    not go beside whole heads; tied: layers that go with others of these."""

    groups: list[ChannelGroup] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    head_dims: list[ChannelGroup] = field(default_factory=list)
    whole_heads: dict[str, str] = field(default_factory=dict)
    not_both: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def tie(self, layers: Iterable[str]) -> None:
        """Layers of heads that are kept go with the first of them."""
        first, *others = layers
        self.tied |= dict.fromkeys(others, f"{TIED}{first}")

    def with_unnamed(self, unnamed: "Found", divided: Container[str]) -> bool:
        """Take what names do not show; whether there are any groups. divided: layers of which it was said that views
        divide their channels, which tells less than why their heads stay."""
        made = {member.layer for group in unnamed.groups for member in group.role("producer")}
        self.groups += unnamed.groups
        dims = {edge.layer: group.name for group in self.head_dims for edge in group.role("consumer")}
        for group in unnamed.groups:
            for name in {dims[edge.layer] for edge in group.role("consumer") if edge.layer in dims}:
                self.not_both[name] = "its heads were not found by the names that its dimensions were found by"
        self.head_dims += [group for group in unnamed.head_dims
                           if all(edge.layer not in dims for edge in group.role("consumer"))]
        self.not_both |= {name: why for name, why in unnamed.not_both.items() if name not in dims.values()}
        self.whole_heads |= {name: why for name, why in unnamed.whole_heads.items() if name not in dims.values()}
        reasons = {**self.tied, **unnamed.tied, **unnamed.skipped}
        self.skipped = {**{layer: why for layer, why in reasons.items() if layer in divided}, **self.skipped}
        self.skipped = {layer: why for layer, why in self.skipped.items() if layer not in made}
        return bool(unnamed.groups)

    def layers(self) -> dict[str, set[str]]:
        """Role -> the layers that play it in the groups."""
        found: dict[str, set[str]] = {"producer": set(), "consumer": set()}
        for group in self.groups:
            for member in group.members:
                if member.role not in ("width", "tensor"):  # which others may have a part in, too
                    found.setdefault(member.role, set()).add(member.layer)
        return found
