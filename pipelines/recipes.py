"""Training recipes: functions that return a full configuration. Every field can be overridden on the command line."""

from dataclasses import dataclass, field, replace

from d2l.chunking import ChunkingConfig, split_evenly
from d2l.context_encoder import EncoderConfig
from d2l.errors import UserError
from d2l.hypernetwork import HypernetworkConfig
from pipelines.training.tasks import FactsTask, NeedleTask, QuestionsTask, RepeatTask, Task


@dataclass(frozen=True)
class Share:
    """A task's part in a mixture."""

    task: Task
    """What is learned."""
    weight: float = 1.0
    """Its share of the document tokens, relative to the others'."""
    unrelated: float = 0.0
    """Share, of its batches of several documents, in which each is asked the questions of another one. What the base
    model says to them by itself is learned there, and counts as it is, whatever the weights of `LossConfig`: an adapter
    shall not change answers that its document has nothing to do with."""

    def __post_init__(self) -> None:
        if not 0 <= self.unrelated <= 1:
            raise UserError(f"unrelated is a share of batches, from 0 to 1, got {self.unrelated}")
        same = isinstance(self.task, NeedleTask) or (isinstance(self.task, RepeatTask) and self.task.asked)
        if self.unrelated and same:
            raise UserError(f"{type(self.task).__name__} asks every document the same: it has no unrelated questions")


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum: a mixture of tasks."""

    steps: int
    """Optimizer steps."""
    mixture: tuple[Share, ...]
    """The tasks; every batch is of one of them."""
    batch_tokens: int = 4096
    """Document tokens of one batch at most, padding included. A document that is longer is skipped."""
    question_tokens: int = 6144
    """Tokens of its questions with their answers at most, padding included, as long as it has several documents: these
    are what takes memory, for they have gradients. A question of a training set that is longer is skipped."""
    chunk_counts: tuple[float, ...] = ()
    """Weights of cutting a document into 1, 2, 3 ... chunks even if fewer do; if empty, into as few as it fits."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_tokens, self.question_tokens) < 1:
            raise UserError("a stage needs steps, batch_tokens and question_tokens of at least 1")
        if not self.mixture or min(share.weight for share in self.mixture) <= 0:
            raise UserError("a stage needs tasks with weights above 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine to `final` times the peak."""

    learning_rate: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    warmup_steps: int = 50
    """Steps up to the peak."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    clip: float = 1.0
    """Largest gradient norm."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised: the sum of the terms that a batch has, each times its weight."""

    answers: float = 1.0
    """Cross-entropy on given answers."""
    teacher: float = 1.0
    """Cross-entropy against the teacher's log-probabilities."""
    l1: float = 0.0
    """Mean absolute value of the generated factors."""
    addressing: float = 0.0
    """Cross-entropy of where in the document a question looks, against where its answer stands. Only with it do the
    hypernetwork's `reading_modules` learn. For generators that write a row for every token."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how."""

    base: str = "smollm2-135m"
    """Base model: a folder, an s3:// folder, a hub id, or a bundled name."""
    hypernetwork: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    """The hypernetwork; with `--init-from`, that checkpoint's configuration counts."""
    stages: tuple[Stage, ...] = ()
    """The curriculum, one stage after the other."""
    batches_per_step: int = 1
    """Batches whose gradients make one optimizer step, whatever the number of workers, which has to divide it."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the losses."""
    gradient_checkpointing: bool = False
    """Compute the base model's activations at questions again in the backward pass: a third more time, far less memory.
    Those at documents, which only addressing has gradients for, are kept."""
    data: str | None = None
    """Training set of tasks that name none (`d2l prepare` makes one)."""
    prose: str | None = None
    """Parquet file with a column `text`, or a text file, for haystacks of prose; every tenth text is for evaluation."""
    dev_documents: int = 32
    """Documents of each task that evaluation in the course of training is on, the same ones every time."""
    seed: int = 0
    """Everything random follows from it."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("the recipe has no steps; give it a stage")
        if self.batches_per_step < 1:
            raise UserError(f"batches_per_step must be at least 1, got {self.batches_per_step}")
        for stage, task in ((s, share.task) for s in self.stages for share in s.mixture):
            if not isinstance(task, NeedleTask):
                continue
            chunks = split_evenly(range(task.max_tokens), self.hypernetwork.chunking)
            if (tokens := len(chunks) * len(chunks[0])) > stage.batch_tokens:
                raise UserError(
                    f"needle task: documents of {task.max_tokens} tokens, {tokens} with overlaps of chunks, do not fit "
                    f"batch_tokens {stage.batch_tokens}"
                )

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return sum(stage.steps for stage in self.stages)

    def stage_of(self, step: int) -> int:
        """The number of the stage that `step` (from 0) belongs to; of the last one at the end."""
        for number, stage in enumerate(self.stages[:-1]):
            if step < stage.steps:
                return number
            step -= stage.steps
        return len(self.stages) - 1


_HYPERNETWORK = HypernetworkConfig(chunking=ChunkingConfig(max_chunk_tokens=256, overlap_tokens=24))
"""Chunks overlap by more than a needle, so that every needle is whole in one of them."""


def needle() -> Recipe:
    """Find numbers in long texts: single chunks first, then several kinds of needles, then many chunks."""
    return Recipe(
        hypernetwork=_HYPERNETWORK,
        stages=(
            Stage(80, (Share(NeedleTask(30, 60)),), batch_tokens=1400),
            Stage(60, (Share(NeedleTask(60, 256, keyed=0.6, prose=0.5)),), batch_tokens=3000),
            Stage(160, (Share(NeedleTask(256, 3072, keyed=0.6, prose=0.5)),), batch_tokens=6144),
        ),
    )


def facts() -> Recipe:
    """Answer questions about generated facts, in other words than the document's: from copying to reading."""
    mixture = (Share(FactsTask(), 0.7), Share(RepeatTask(max_tokens=128), 0.3))
    easy = (Share(FactsTask(max_facts=4), 0.7), Share(RepeatTask(max_tokens=128), 0.3))
    return Recipe(
        hypernetwork=_HYPERNETWORK,
        stages=(Stage(300, easy, batch_tokens=1024), Stage(700, mixture, batch_tokens=1536)),
    )


def qa() -> Recipe:
    """Answer questions about documents of a training set: by way of generated facts, then both, then longer documents.

    Made for paragraphs: only documents that fill a batch at most are learned from, of up to 488 tokens, in the end up
    to 1,880. They are read twice, and reading is learned with the rest: by where questions are to look for their
    answers.
    """
    keyed, prose = 0.6, 0.5
    easy = (
        Share(FactsTask(max_facts=4, sentences=0.2), 0.6),
        Share(NeedleTask(60, 256, keyed, prose=prose), 0.25),
        Share(RepeatTask(max_tokens=128), 0.15),
    )
    mixed = (
        Share(QuestionsTask(max_document_tokens=512), 0.38, unrelated=0.15),
        Share(FactsTask(max_facts=16, sentences=0.2), 0.37, unrelated=0.1),
        Share(NeedleTask(60, 400, keyed, prose=prose), 0.2),
        Share(RepeatTask(max_tokens=128), 0.05),
        Share(RepeatTask(max_tokens=128, asked=False), 0.2, unrelated=1.0),
    )
    long = (
        Share(NeedleTask(256, 1850, keyed, prose=prose), 0.6),
        Share(QuestionsTask(max_document_tokens=2048), 0.25),
        Share(FactsTask(max_facts=64, sentences=0.2), 0.15),
    )
    return Recipe(
        hypernetwork=replace(
            _HYPERNETWORK,
            encoder=EncoderConfig("activations", read_twice=True),
            reading_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
            bias_rank=16,
        ),
        stages=(Stage(200, easy, 320), Stage(480, mixed, 512), Stage(30, long, 2048)),
        loss=LossConfig(addressing=0.5),
    )


def static() -> Recipe:
    """One adapter for all documents: it learns what answers look like, and of no document anything."""
    return _baseline(QuestionsTask(max_document_tokens=512))


def tuned_reader() -> Recipe:
    """One adapter for all documents, with the document in the prompt: what a model of its size can answer at all."""
    return _baseline(QuestionsTask(max_document_tokens=512, in_prompt=True))


def _baseline(task: QuestionsTask) -> Recipe:
    """What is to be beaten, or come near to: a LoRA as `d2l train qa` writes one, of the rank that is stored: 128."""
    hypernetwork = HypernetworkConfig("static", encoder=EncoderConfig("early_exit", 1), bias_rank=127)
    return Recipe(hypernetwork=hypernetwork, stages=(Stage(250, (Share(task),), batch_tokens=512),), batches_per_step=4)


def gemma2_2b() -> Recipe:
    """The paper's question answering on Gemma 2 2B."""
    return _paper("google/gemma-2-2b-it")


def mistral_7b() -> Recipe:
    """The paper's question answering on Mistral 7B."""
    return _paper("mistralai/Mistral-7B-Instruct-v0.2")


def qwen3_4b() -> Recipe:
    """The paper's question answering on Qwen3 4B."""
    return _paper("Qwen/Qwen3-4B-Instruct-2507")


def _paper(base: str) -> Recipe:
    """Doc-to-LoRA (arXiv 2602.15902): single chunks, then several, learned from the teacher's log-probabilities.

    A step has 8 batches, so that 1, 2, 4 or 8 workers take the same steps.
    """
    questions = (Share(QuestionsTask(targets="teacher", teacher="stream")),)
    return Recipe(
        base=base,
        hypernetwork=HypernetworkConfig(
            generator="perceiver",
            generator_config={"width": 512, "latents": 8, "blocks": 9},
            encoder=EncoderConfig("per_layer"),
            target_modules=("down_proj",),
            rank=8,
            bias_rank=8,
            scale=2 * 8**1.5,
            chunking=ChunkingConfig(max_chunk_tokens=1024),
        ),
        stages=(
            Stage(80_000, questions, batch_tokens=16_384),
            Stage(20_000, questions, batch_tokens=16_384, chunk_counts=(0.5, 0.125, *[0.0625] * 6)),
        ),
        batches_per_step=8,
        optimizer=OptimizerConfig(learning_rate=4e-5, beta2=0.999, warmup_steps=1000, final=0.0),
        loss=LossConfig(l1=0.1),
        gradient_checkpointing=True,
    )
