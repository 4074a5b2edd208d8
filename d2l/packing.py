"""Weights laid out once as a CPU multiplies by them, for models that only answer.

Before it multiplies by bfloat16 weights, oneDNN lays them out in blocks, each time anew; with the few tokens of a
decoding step that takes about as long as the product. Laid out once, they give the same numbers, bit for bit. It is
what `torch.compile` with freezing does, too, which wants a C++ compiler on every machine.
"""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """A linear module without its weight: it keeps what oneDNN made of it, and has no gradients."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight)

    def forward(self, input: Tensor) -> Tensor:
        """As the module did that it was made of: [..., in_features] to [..., out_features], bfloat16."""
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replace all linear modules of a bfloat16 model on a CPU that has instructions for such products.

    Weights that are no other module's are freed.
    """
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(path, PackedLinear(module))
