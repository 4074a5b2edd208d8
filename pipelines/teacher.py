"""The teacher: the base model with the document in its prompt, whose log-probabilities an adapted model learns to give.

`Teacher` is a callable for Ray Data's `map_batches`, both where a training set is prepared and on the fly between the
reader of a training set and its trainer.

A document's prompts, one for each question, begin with the same tokens. They are laid out as one sequence, a tree: the
beginning once, then each prompt's rest with its answer as a branch that sees the beginning and itself. So a document is
read once for all its questions; the result is that of a sequence of its own for each, up to rounding.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from d2l.base_model import BaseModel, load_base_model
from d2l.chat import around_document
from d2l.chunking import text_ids
from pipelines import cluster

TOP = 16
"""Likeliest tokens that are kept at each position of an answer."""
TARGET_COLUMNS = {
    "teacher_ids": pa.list_(pa.list_(pa.int32())),
    "teacher_log_probs": pa.list_(pa.list_(pa.float16())),
}
"""What the teacher adds to a row: for each question a flattened [answer tokens, TOP], the end token included."""
T = TypeVar("T")
_HEAD_TOKENS = 512
"""Positions whose logits are held at a time: each is as wide as the vocabulary."""


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The tokens that an assistant answers with, the one that ends the answer included."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def document_prompts(tokenizer: PreTrainedTokenizerBase, document: str, questions: Sequence[str]) -> list[list[int]]:
    """The tokens of each question's conversation with the document in it, up to where the assistant answers."""
    if not questions:  # a document that is left out may have no text
        return []
    ids, around = text_ids(document, tokenizer), [around_document(tokenizer, question) for question in questions]
    return [[*before, *ids, *after] for before, after in around]


class Example(NamedTuple):
    """A question in its prompt, and the answer that is given."""

    prompt: Sequence[int]
    """Tokens up to where the assistant answers."""
    answer: Sequence[int]
    """From `answer_ids`."""


class Targets(NamedTuple):
    """What the teacher says at each token of an answer."""

    ids: np.ndarray
    """[answer tokens, TOP] int32: its likeliest tokens, the likeliest first."""
    log_probs: np.ndarray
    """[answer tokens, TOP] float16: theirs, not renormalised."""


def batches_by_length(items: Iterable[T], length: Callable[[T], int], batch_tokens: int) -> Iterator[list[T]]:
    """Batches of items of about one length, the shortest first, of at most `batch_tokens` with padding; or of one."""
    batch: list[T] = []
    for item in sorted(items, key=length):
        if batch and (len(batch) + 1) * length(item) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


class Teacher:
    """A base model that is asked for its targets."""

    def __init__(
        self,
        base: str | BaseModel,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        batch_tokens: int = 8192,
        processes: int = 1,
    ):
        """Load the base model.

        Args:
            base: loaded, or as `d2l.base_model.load_base_model` takes it.
            device: by default a GPU where there is one.
            dtype: of the base model.
            batch_tokens: tokens of one forward pass, padding included; attention takes their square in the worst case.
            processes: how many of a kind the cluster has.
        """
        self.processes = processes
        self.base = base if isinstance(base, BaseModel) else load_base_model(base, device, dtype)
        self.batch_tokens = batch_tokens
        sliding = getattr(self.base.model.config.get_text_config(), "sliding_window", None)
        self.window: int = min(self.base.window, sliding or self.base.window)
        """Tokens of a prompt with its answer at most; a sliding window counts, for a tree's mask knows none."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Add `TARGET_COLUMNS` to rows of a prepared training set.

        Args:
            batch: `document` string, `questions` and `answers` list<string>, whatever else.

        Returns:
            The same rows; the schema's metadata says whose targets they are. Targets are null for a document that does
            not fit the window with each of its questions.
        """
        rows = batch.select(["document", "questions", "answers"]).to_pylist()
        targets = self.targets([self.examples(**row) for row in rows])
        for i, (name, kind) in enumerate(TARGET_COLUMNS.items()):
            column = [None if t is None else [pair[i].ravel() for pair in t] for t in targets]
            batch = batch.append_column(name, pa.array(column, kind))
        base = {"base_model": self.base.name, **asdict(self.base.digests)}
        return batch.replace_schema_metadata({"d2l.teacher": json.dumps(base | {"top": TOP}, sort_keys=True)})

    def examples(self, document: str, questions: Sequence[str], answers: Sequence[str]) -> list[Example]:
        """A document's questions as the base model is asked them."""
        tokenizer = self.base.tokenizer
        prompts = document_prompts(tokenizer, document, questions)
        return [Example(p, answer_ids(tokenizer, answer)) for p, answer in zip(prompts, answers, strict=True)]

    @torch.no_grad()
    def targets(self, documents: Sequence[Sequence[Example]]) -> list[list[Targets] | None]:
        """Targets of each document's examples; None for a document that does not fit the window with each of them."""
        cluster.share_cores(cluster.on_each_machine(self.processes))
        found: list[list[Targets | None] | None] = []
        trees: list[_Tree] = []
        for number, examples in enumerate(documents):
            fits = all(len(e.prompt) + len(e.answer) - 1 <= self.window for e in examples)
            found.append([None] * len(examples) if fits else None)
            if fits and examples:
                trees += _trees(number, examples, self.batch_tokens)
        for batch in batches_by_length(trees, lambda tree: len(tree.ids), self.batch_tokens):
            for (document, example), targets in self._forward(batch):
                found[document][example] = targets  # type: ignore[index]
        return found  # type: ignore[return-value]

    def _forward(self, trees: list["_Tree"]) -> Iterator[tuple[tuple[int, int], Targets]]:
        device, dtype, width = self.base.device, self.base.dtype, max(len(tree.ids) for tree in trees)

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)

        branch = padded([tree.branch for tree in trees], -1)
        sees = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        sees &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
        # Added to attention scores, which every implementation of attention understands.
        mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
        hidden = self.base.decoder(
            input_ids=padded([tree.ids for tree in trees], self.base.pad_id),
            position_ids=padded([tree.positions for tree in trees], 0),
            attention_mask=mask.unsqueeze(1),
            use_cache=False,
        ).last_hidden_state
        places = [(row, place) for row, tree in enumerate(trees) for span in tree.spans for place in span]
        rows, columns = torch.tensor(places, device=device).T
        ids, log_probs = self._likeliest(hidden[rows, columns])
        start = 0
        for tree in trees:
            for source, span in zip(tree.sources, tree.spans, strict=True):
                end = start + len(span)
                yield source, Targets(ids[start:end], log_probs[start:end])
                start = end

    def _likeliest(self, hidden: Tensor) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for part in hidden.split(_HEAD_TOKENS):
            logits = self.base.logits(part).float()
            values, ids = logits.topk(TOP)
            found.append((ids.int(), (values - logits.logsumexp(-1, keepdim=True)).half()))
        ids, log_probs = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return ids, log_probs


@dataclass
class _Tree:
    """Prompts with a common beginning, and their answers, as one sequence."""

    ids: list[int]
    """The beginning, then for each example the rest of its prompt and its answer without the last token."""
    positions: list[int]
    """Where a token would stand if its example were alone."""
    branch: list[int]
    """0 in the beginning, 1, 2 ... in the examples' own tokens."""
    spans: list[range]
    """For each example, the places whose next tokens are its answer."""
    sources: list[tuple[int, int]]
    """For each example, the numbers of its document and of the example in it."""


def _trees(document: int, examples: Sequence[Example], batch_tokens: int) -> list[_Tree]:
    """A document's examples, in one tree or as many as keep to `batch_tokens`."""
    places = zip(*(example.prompt[:-1] for example in examples), strict=False)  # a branch has at least one token
    stem = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, places)]
    trees: list[_Tree] = []
    for number, (prompt, answer) in enumerate(examples):
        own = [*prompt[len(stem) :], *answer[:-1]]
        if not trees or len(trees[-1].ids) + len(own) > batch_tokens:
            trees.append(_Tree(list(stem), list(range(len(stem))), [0] * len(stem), [], []))
        tree = trees[-1]
        tree.ids += own
        tree.positions += range(len(stem), len(stem) + len(own))
        tree.spans.append(range(len(tree.ids) - len(answer), len(tree.ids)))
        tree.sources.append((document, number))
        tree.branch += [len(tree.spans)] * len(own)
    return trees
