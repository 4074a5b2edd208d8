"""The static generator writes nothing: every document's adapter is the bias block.

A baseline. Trained on the same data it learns what answers look like and nothing about the document; trained with the
document in the prompt, it is how well a reader of its size can answer at all.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from d2l.context_encoder import Features
from d2l.factors import Factors, LowRank
from d2l.generators import Shapes


@dataclass(frozen=True)
class Config:
    """Nothing to choose: the size is `HypernetworkConfig.bias_rank`."""


class Generator(nn.Module):
    """One row of zeros for each chunk: A [layers, chunks, 1, d_in], B [layers, chunks, 1, d_out]."""

    encoder_kinds: ClassVar[tuple[str, ...]] = ("early_exit", "per_layer", "activations")
    token_rows: ClassVar[bool] = False

    def __init__(self, config: Config, shapes: Shapes, encoder_kind: str, rank: int):
        super().__init__()
        self.shapes = shapes

    def priors(self) -> None:
        """Rows are factors."""

    def forward(self, features: Features) -> Factors:
        """Zeros, whatever the chunks."""
        size = (self.shapes.layers, len(features.final), 1)
        zeros = {
            name: [
                torch.zeros(*size, width, dtype=features.final.dtype, device=features.final.device) for width in pair
            ]
            for name, pair in self.shapes.modules.items()
        }
        return {name: LowRank(a, b) for name, (a, b) in zeros.items()}
