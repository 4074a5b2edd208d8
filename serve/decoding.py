"""One batch of prompts on its way through the model, a token at a time, each row with its own adapter or none.

Stepping by hand, where the library's `generate` runs a batch to its end, lets every row have its own sampling, length
and stop strings, be read while it grows, and leave when it is done or nobody waits for it any more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.generation import SamplingConfig
from d2l.injection import Rows, inject, place_rows


class DecodingBatch:
    """The state of a batch: KV cache, attention mask, and the tokens that the model has not seen yet."""

    def __init__(self, base: BaseModel, prompts: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]):
        self._base = base
        self._cache = DynamicCache(config=base.model.config)
        width = max(map(len, prompts))
        ids = [[base.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self._new_RT = torch.tensor(ids, device=base.device)
        self._mask_RT = torch.tensor(mask, device=base.device)
        self._factors, self._rows, self._layers = place_rows(base, adapters)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Run the new tokens: logits [rows, vocabulary] of each row's next one, in fp32."""
        positions = (self._mask_RT.cumsum(1) - 1).clamp(min=0)[:, -self._new_RT.shape[1] :]
        with inject(self._base, self._factors, self._rows, self._layers):
            output = self._base.model(
                input_ids=self._new_RT,
                attention_mask=self._mask_RT,
                position_ids=positions,
                cache=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()

    def append(self, tokens: Sequence[int]) -> None:
        """Give each row its next token."""
        self._new_RT = torch.tensor(tokens, device=self._base.device).unsqueeze(1)
        self._mask_RT = torch.cat([self._mask_RT, torch.ones_like(self._new_RT)], 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows go."""
        index = torch.tensor(rows, dtype=torch.long, device=self._base.device)
        self._cache.batch_select_indices(index)
        self._new_RT, self._mask_RT = self._new_RT[index], self._mask_RT[index]
        self._rows = Rows(tuple(self._rows.adapters[row] for row in rows))


def choose(logits_V: Tensor, sampling: SamplingConfig, generator: torch.Generator | None) -> int:
    """The next token of one row."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits_V.unsqueeze(0))
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
