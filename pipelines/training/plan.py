"""`d2l train RECIPE --dry-run`: parameters, memory and time of a run, without any weights or data.

A step is run on fake tensors, which have shapes but no contents: operations are counted, and memory is tracked, as they
would be by the real step. What has to be assumed stands in the report.
"""

import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from d2l.base_model import BUNDLED_MODELS, BaseModel, Digests, default_device, resolve
from d2l.chat import Affixes
from d2l.errors import UserError
from d2l.hypernetwork import Hypernetwork
from d2l.storage import one_line
from pipelines.recipes import Recipe, Stage
from pipelines.training.batches import PackedBatch, TrainingBatch, collate
from pipelines.training.learner import MetaLearner
from pipelines.training.loop import new_optimizer
from pipelines.training.tasks import Document, NeedleTask

if TYPE_CHECKING:
    from pipelines.training.job import TrainConfig

KNOWN_SHAPES: dict[str, dict[str, Any]] = {
    "google/gemma-2-2b-it": {"model_type": "gemma2"},
    "mistralai/Mistral-7B-Instruct-v0.2": {"model_type": "mistral", "sliding_window": None},
    "Qwen/Qwen3-4B-Instruct-2507": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    BUNDLED_MODELS["smollm2-135m"]: {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
"""Base models whose shapes are known without their files; what is not named is their architecture's default."""
_QUESTIONS, _PROMPT_TOKENS, _STEM_TOKENS, _ANSWER_TOKENS, _AFFIX_TOKENS = 4, 48, 24, 16, 16
"""Assumed of each document: questions, and tokens of a prompt, of what all prompts begin with, of an answer, and of a
chunk's affixes."""
_CPU_TFLOPS, _GPU_TFLOPS = 0.3, 400.0
"""Assumed rates of one device: about what is sustained on 2 cores with AMX, and on an H100."""


def plan(config: "TrainConfig") -> dict[str, Any]:
    """Estimate a run.

    Returns:
        Parameters, tokens per step, steps, operations per step, memory of one device by kind, devices of workers and of
        their teachers, hours, assumptions.

    Raises:
        UserError: the base model's shapes are unknown and its configuration cannot be fetched.
    """
    recipe, rate = config.recipe, config.device_tflops
    if rate is None:
        gpu = config.gpus_per_worker > 0 or default_device().type == "cuda"
        rate = _GPU_TFLOPS if gpu else _CPU_TFLOPS
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = _fake_base(recipe.base)
        hypernetwork = Hypernetwork(recipe.hypernetwork, base).train()
        learner = MetaLearner(base, hypernetwork, recipe.loss, recipe.gradient_checkpointing)
        stages = [_measured(learner, base, stage, recipe) for stage in recipe.stages]
    flops = [operations for operations, _ in stages]
    memory = max((memory for _, memory in stages), key=lambda kinds: kinds["activations"])
    operations = sum(n * s.steps for n, s in zip(flops, recipe.stages, strict=True)) * recipe.batches_per_step
    devices, lengths = config.workers, [_document_tokens(recipe, stage) for stage in recipe.stages]
    tasks = [share.task for stage in recipe.stages for share in stage.mixture]
    taught = any(getattr(task, "streams_teacher", False) for task in tasks)
    return {
        "base": recipe.base,
        "parameters_base": sum(p.numel() for p in base.model.parameters()),
        "parameters_hypernetwork": sum(p.numel() for p in hypernetwork.parameters()),
        "steps": recipe.steps,
        "document_tokens_per_step": [s.batch_tokens * recipe.batches_per_step for s in recipe.stages],
        "document_tokens": sum(s.steps * s.batch_tokens for s in recipe.stages) * recipe.batches_per_step,
        "tflop_per_batch": [n / 1e12 for n in flops],
        "memory_gb_per_device": {name: size / 1e9 for name, size in memory.items()},
        "devices": devices,
        "teacher_devices": devices * config.data.teachers * (config.data.gpus_per_teacher or 1) if taught else 0,
        "assumed_tflops_per_device": rate,
        "estimated_hours": operations / (rate * 1e12) / devices / 3600,
        "assumptions": (
            f"batches full; documents of {', '.join(map(str, lengths))} tokens by stage, each with {_QUESTIONS} "
            f"questions of {_PROMPT_TOKENS} tokens, {_STEM_TOKENS} of them the same (and the document if it is in the "
            f"prompt), and answers of {_ANSWER_TOKENS}; teachers keep up, no addressing; memory is the highest peak of "
            "all stages' steps, without the allocator's fragments"
        ),
    }


def _fake_base(name: str) -> BaseModel:
    name = BUNDLED_MODELS.get(name, name)
    model = AutoModelForCausalLM.from_config(_shapes(name), dtype=torch.bfloat16)
    model.requires_grad_(False).eval()
    base = BaseModel(name, model, None, Digests("", "", ""))  # type: ignore[arg-type]
    base.affixes = Affixes((0,) * _AFFIX_TOKENS, ())  # else it would ask the tokenizer
    return base


def _shapes(name: str) -> PreTrainedConfig:
    if name in KNOWN_SHAPES:
        return AutoConfig.for_model(**KNOWN_SHAPES[name])
    try:
        return AutoConfig.from_pretrained(resolve(name) if "://" in name else name)
    except (OSError, ValueError) as error:
        known, reason = ", ".join(KNOWN_SHAPES), one_line(error)
        raise UserError(f"base model {name}: shapes unknown ({reason}); known without files are {known}") from error


def _document_tokens(recipe: Recipe, stage: Stage) -> int:
    """Of a needle task its mean length; nothing is known of other data: one chunk."""
    task, chunk = stage.mixture[0].task, recipe.hypernetwork.chunking.max_chunk_tokens
    if not isinstance(task, NeedleTask):
        return min(chunk, stage.batch_tokens)
    return round(task.mean_tokens)


def _fake_batch(base: BaseModel, recipe: Recipe, stage: Stage) -> TrainingBatch:
    tokens = _document_tokens(recipe, stage)
    chunks = math.ceil(tokens / recipe.hypernetwork.chunking.max_chunk_tokens)
    stem = _STEM_TOKENS + (tokens if getattr(stage.mixture[0].task, "in_prompt", False) else 0)
    document = Document(
        chunks=[np.zeros(tokens // chunks, np.int32)] * chunks,
        prompts=[np.repeat(np.int32([0, i]), [stem, _PROMPT_TOKENS - _STEM_TOKENS]) for i in range(_QUESTIONS)],
        answers=[np.zeros(_ANSWER_TOKENS, np.int32)] * _QUESTIONS,
    )
    documents = [document] * max(1, stage.batch_tokens // tokens)
    return collate(PackedBatch("plan", True, documents), base.affixes, 0)


def _measured(learner: MetaLearner, base: BaseModel, stage: Stage, recipe: Recipe) -> tuple[float, dict[str, int]]:
    """Operations of one batch, and bytes by kind; `activations` is the peak of what forward and backward allocate."""
    batch = _fake_batch(base, recipe, stage)
    optimizer = new_optimizer(learner.hypernetwork, recipe.optimizer)
    for parameter in learner.hypernetwork.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with _Allocations() as allocations, FlopCounterMode(display=False) as counter:
        loss, _ = learner(batch)
        loss.backward()
    trained = sum(parameter.nbytes for parameter in learner.hypernetwork.parameters())
    state = [tensor.nbytes for values in optimizer.state.values() for tensor in values.values()]
    # What the fake documents leave of the budget, real ones of other lengths fill.
    filled = len(batch.questions) * _document_tokens(recipe, stage) / stage.batch_tokens
    return counter.get_total_flops() / filled, {
        "base": sum(parameter.nbytes for parameter in base.model.parameters()),
        "hypernetwork": trained,
        "gradients": trained,
        "optimizer": sum(state),
        "activations": allocations.peak,
    }


class _Allocations(TorchDispatchMode):
    """Bytes of the tensors that are made while it lasts and still live: the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given | self._known:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
