"""The learner: hypernetwork and frozen base model as one module, from a batch to its loss.

A document is encoded once for all its questions, and what all its prompts begin with is read once.
Weights are float32, matrix products in the base model's dtype.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from d2l.base_model import BaseModel
from d2l.context_encoder import recording
from d2l.errors import UserError
from d2l.factors import Factors, map_tensors
from d2l.hypernetwork import Hypernetwork
from d2l.injection import Rows, inject
from d2l.losses import addressing, cross_entropy, distillation, divergence, l1, mean_by_document, reduce_parts
from d2l.memory import Prior, read_weights
from pipelines.recipes import LossConfig
from pipelines.training.batches import TrainingBatch

_ADDRESSED = 0.4
"""Share of the base model's depth from which on questions are to look where their answers stand: not before they have
been understood."""
Adapted = Callable[[Sequence[int]], AbstractContextManager[None]]
"""See `MetaLearner.adapters`."""


class MetaLearner(nn.Module):
    """One module, so that DDP sees all parameters used; only the hypernetwork's have gradients."""

    def __init__(
        self, base: BaseModel, hypernetwork: Hypernetwork, loss: LossConfig, gradient_checkpointing: bool = False
    ):
        super().__init__()
        if loss.addressing and hypernetwork.generator.priors() is None:
            raise UserError(
                f"loss.addressing is for a generator whose rows are regressed, not {hypernetwork.config.generator}"
            )
        self._late = [i for i, layer in enumerate(hypernetwork.layers) if layer >= _ADDRESSED * len(base.layers)]
        if loss.addressing and not self._late:
            raise UserError(
                f"loss.addressing is for layers from {_ADDRESSED:.0%} of the base model's on, "
                f"and the hypernetwork adapts only {', '.join(map(str, hypernetwork.layers))}"
            )
        for parameter in hypernetwork.reading_parameters():
            parameter.requires_grad_(loss.addressing > 0)
        self.hypernetwork = hypernetwork
        self._base = [base]  # a list hides the frozen model from nn.Module
        self.weights = loss
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and metrics.

        Returns:
            The loss, a scalar; and `answer_loss`, `token_accuracy`, `exact_match` (share of answers that are right
            throughout, given their beginnings), or where questions are unrelated `divergence_loss`; where there is a
            teacher `teacher_loss`, where they count `l1` and `addressing_loss`.
        """
        rows, adapted = self.adapters(batch)
        seen: dict[str, list[Tensor]] = {}
        if self.weights.addressing and batch.found is not None:
            seen = {name: [] for name in self.hypernetwork.config.target_modules}
        return self._losses(batch, self._logits(batch, adapted, seen), rows, seen)

    def _logits(self, batch: TrainingBatch, adapted: Adapted, seen: dict[str, list[Tensor]]) -> Tensor:
        """[answer tokens, vocabulary]: only where answers stand, for the head is by far the widest matrix.

        `seen` of a module gets its inputs there, too, [answer tokens, d_in] for each of the late adapted layers.
        """
        base = self._base[0]
        stem, cache, recomputed = batch.stem, None, nullcontext()
        if self.gradient_checkpointing:  # a layer that is run again would put its keys into the cache again
            stem, recomputed = 0, _recomputed(base, partial(adapted, batch.questions))
        if stem:
            cache, device = DynamicCache(config=base.model.config), batch.ids.device
            first = torch.tensor([0, *accumulate(batch.questions[:-1])], device=device)
            with adapted([1] * len(first)):
                base.decoder(input_ids=batch.ids[first, :stem], cache=cache, use_cache=True)
            cache.batch_select_indices(torch.tensor(_owners(batch.questions), device=device))
        with adapted(batch.questions), recomputed, ExitStack() as stack:
            for name, inputs in seen.items():
                targets = base.targets(name)
                modules = [targets[self.hypernetwork.layers[i]] for i in self._late]
                stack.enter_context(recording(modules, inputs))
            hidden = base.decoder(input_ids=batch.ids[:, stem:], cache=cache, use_cache=bool(stem)).last_hidden_state
        places = batch.places - stem * (batch.places // batch.ids.shape[1] + 1)
        for inputs in seen.values():
            inputs[:] = [x.flatten(0, 1)[places] for x in inputs]
        return base.logits(hidden.flatten(0, 1)[places])

    def adapters(self, batch: TrainingBatch) -> tuple[Factors, Adapted]:
        """Generate the adapters of a batch's documents.

        Returns:
            The rows of each chunk, and a function from how many questions each document has, one after the other, to a
            context in which the base model has the document's adapter for each of them.
        """
        base, dtype = self._base[0], self._base[0].dtype
        mixed = torch.autocast(base.device.type, dtype) if dtype != torch.float32 else nullcontext()
        with mixed:
            rows = self.hypernetwork(batch.chunks)
            joined = self.hypernetwork.join(rows, batch.chunks_per_document)
        factors = map_tensors(joined, lambda t: t.to(dtype))
        bias = map_tensors(self.hypernetwork.bias_factors() or {}, lambda t: t.to(dtype).unsqueeze(1))
        layers, scale = self.hypernetwork.layers, self.hypernetwork.config.scale

        @contextmanager
        def adapted(questions: Sequence[int]) -> Iterator[None]:
            documents = Rows(_owners(questions))
            everywhere = Rows((0,) * sum(questions))
            # On CPUs, the backward pass of the flash kernel is slow for many short rows.
            attention = sdpa_kernel(SDPBackend.MATH) if base.device.type == "cpu" else nullcontext()
            own = inject(base, factors, documents, layers, scale)
            shared = inject(base, bias, everywhere, layers, scale) if bias else nullcontext()
            with attention, own, shared:
                yield

        return rows, adapted

    def _losses(
        self, batch: TrainingBatch, logits: Tensor, rows: Factors, seen: dict[str, list[Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def mean(losses: Tensor) -> Tensor:
            return mean_by_document(losses, batch.answer_lengths, batch.questions)

        if batch.unrelated:
            with torch.no_grad():
                own = self._logits(batch, lambda _: nullcontext(), {})
            loss = mean(divergence(logits, own))
            metrics = {"divergence_loss": loss}
        else:
            with nullcontext() if batch.learns_answers else torch.no_grad():
                answer_loss = mean(cross_entropy(logits, batch.labels))
            loss = self.weights.answers * answer_loss if batch.learns_answers else torch.zeros_like(answer_loss)
            right = logits.detach().argmax(-1) == batch.labels
            exact = reduce_parts(right.float(), "min", batch.answer_lengths)
            metrics = {"answer_loss": answer_loss, "token_accuracy": right.float().mean(), "exact_match": exact.mean()}
        if batch.teacher_ids is not None:
            assert batch.teacher_log_probs is not None
            metrics["teacher_loss"] = mean(distillation(logits, batch.teacher_log_probs, batch.teacher_ids))
            loss = loss + self.weights.teacher * metrics["teacher_loss"]
        if self.weights.l1:
            metrics["l1"] = l1(rows)
            loss = loss + self.weights.l1 * metrics["l1"]
        if seen:
            metrics["addressing_loss"] = self._addressing(batch, rows, seen)
            loss = loss + self.weights.addressing * metrics["addressing_loss"]
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _addressing(self, batch: TrainingBatch, rows: Factors, seen: dict[str, list[Tensor]]) -> Tensor:
        """The mean over modules, layers, documents, and answer tokens that their documents have."""
        priors, found_P3 = self.hypernetwork.generator.priors(), batch.found
        assert priors is not None
        assert found_P3 is not None
        rows_NT, losses, first = self.hypernetwork.encoder.rows(batch.chunks), [], 0
        found_P3 = found_P3[rows_NT[found_P3[:, 1], found_P3[:, 2]]]
        for count in batch.chunks_per_document:
            pairs_P3 = found_P3[(found_P3[:, 1] >= first) & (found_P3[:, 1] < first + count)]
            rows_CT = rows_NT[first : first + count]
            numbers_CT = (rows_CT.flatten().cumsum(0) - 1).view_as(rows_CT)
            asked, tokens = pairs_P3[:, 0].unique(return_inverse=True)
            rows_P = numbers_CT[pairs_P3[:, 1] - first, pairs_P3[:, 2]]
            for name, inputs in seen.items() if len(asked) else ():
                keys = rows[name].a[self._late, first : first + count][:, rows_CT]
                s_L, background_LNi = (tensor[self._late] for tensor in priors[name])
                for a, x, s, background in zip(keys, inputs, s_L.detach(), background_LNi, strict=True):
                    # A layer at a time, and again in the backward pass: the systems of all are rows squared each.
                    prior = Prior(s.unsqueeze(0), background.unsqueeze(0))
                    losses.append(checkpoint(_surprise, a, x[asked], prior, tokens, rows_P, use_reentrant=False))
            first += count
        return torch.stack(losses).mean() if losses else next(iter(rows.values())).a.sum() * 0


def _surprise(a: Tensor, x: Tensor, prior: Prior, tokens: Tensor, rows: Tensor) -> Tensor:
    """One layer's loss of addressing. Of norm 1 and without gates: what is worth writing, answers tell."""
    a, x = (nn.functional.normalize(vectors.float(), dim=-1).unsqueeze(0) for vectors in (a, x))
    return addressing(read_weights(a, x, prior), tokens, rows).mean()


def _owners(rows: Sequence[int]) -> tuple[int, ...]:
    """The document of each row, where each document has so many, one after the other."""
    return tuple(document for document, count in enumerate(rows) for _ in range(count))


@contextmanager
def _recomputed(base: BaseModel, adapted: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """While it lasts, layers keep only their inputs for the backward pass, which runs them again.

    By then the adapters' hooks are gone: `adapted` puts them back for the layer that is run again.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), adapted()

    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    with ExitStack() as stack:
        for layer in base.layers:
            layer.forward = partial(again, layer.forward)
            stack.callback(delattr, layer, "forward")
        yield
