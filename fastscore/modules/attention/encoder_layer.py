"""nn.TransformerEncoderLayer that calls its layers, which PyTorch's own reads in one fused kernel where it can."""

from torch import Tensor, nn


class EncoderLayer(nn.TransformerEncoderLayer):
    """What nn.TransformerEncoderLayer computes, of any modules in the place of its own; made by `call_layers` alone."""

    def forward(self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        """As nn.TransformerEncoderLayer.forward."""
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x: Tensor = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        made: Tensor = self.norm2(x + self._ff_block(x))
        return made


def call_layers(model: nn.Module, name: str) -> None:
    """Have what holds the module of that name, of PyTorch's own encoder, call it rather than read it, in place."""
    outer = [model.get_submodule(name[:end]) for end, sign in enumerate(name) if sign == "."]
    for module in (model, *outer):
        if type(module) is nn.TransformerEncoderLayer:
            module.__class__ = EncoderLayer
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # only its layers' fused path takes nested ones
