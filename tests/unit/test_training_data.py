"""Documents, windows and batches of training, without Ray: nothing is lost, doubled, or over the budget."""

import dataclasses
import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2l.chat import Affixes
from d2l.chunking import ChunkingConfig
from d2l.errors import UserError
from d2l.hypernetwork import HypernetworkConfig
from pipelines import recipes
from pipelines.recipes import Recipe, Share, Stage
from pipelines.teacher import TOP
from pipelines.training import parquet, stream
from pipelines.training.batches import PackedBatch, collate, pack
from pipelines.training.job import _anywhere
from pipelines.training.parquet import RowGroups, open_row_groups
from pipelines.training.stages import WINDOW_BATCHES, dev_batches, open_stages
from pipelines.training.tasks import Document, FactsTask, NeedleTask, QuestionsTask, RepeatTask, SourceConfig, open_task


def document(chunks: list[int], prompts: list[int]) -> Document:
    texts = ([np.zeros(length, np.int32) for length in lengths] for lengths in (chunks, prompts))
    return Document(*texts, [np.zeros(2, np.int32)] * len(prompts))


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(st.lists(st.builds(document, lengths, lengths), max_size=60), st.integers(20, 200), st.integers(20, 400))
def test_every_document_is_in_one_batch_within_the_budgets(documents, budget, question_budget):
    skipped: Counter[str] = Counter()
    batches = pack(documents, budget, question_budget, skipped)
    packed = [id(d) for batch in batches for d in batch]
    too_long = [d for d in documents if len(d.chunks) * d.width > budget]
    assert sorted(packed) == sorted(id(d) for d in documents if len(d.chunks) * d.width <= budget)
    assert skipped["documents longer than batch_tokens"] == len(too_long)
    for batch in batches:
        assert sum(len(d.chunks) for d in batch) * max(d.width for d in batch) <= budget
        questions = [len(prompt) + 2 for d in batch for prompt in d.prompts]
        assert len(batch) == 1 or len(questions) * max(questions) <= question_budget


def write_rows(folder, rows, group=5, files=1):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        pq.write_table(pa.Table.from_pylist(rows[i::files]), folder / f"{i}.parquet", row_group_size=group)
    return str(folder.parent)


@given(shards=st.integers(1, 5), epochs=st.integers(1, 3))
def test_every_row_comes_once_an_epoch_whatever_the_shards(shards, epochs, rows23):
    groups = open_row_groups(rows23, ["document"], "train")
    assert groups is not None
    # Deal until all shards together have `epochs` epochs: 6 groups an epoch, in turn.
    seen: list[str] = []
    for shard in range(shards):
        dealt = len(range(shard, 6 * epochs, shards))
        sizes = [groups._groups[groups._dealt("s", shard + turn * shards)[0]][2] for turn in range(dealt)]
        seen += [row["document"] for row in groups.read("s", shard, shards, 0, sum(sizes))]
    assert Counter(seen) == {f"text {i}": epochs for i in range(23)}


@given(start=st.integers(0, 60), length=st.integers(0, 30))
def test_a_stream_can_be_joined_anywhere(start, length, rows23):
    groups = open_row_groups(rows23, ["document"], "train")
    assert groups is not None
    whole = list(groups.read("s", 1, 2, 0, 90))
    assert list(groups.read("s", 1, 2, start, start + length)) == whole[start : start + length]


@pytest.fixture(scope="module")
def rows23(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "train"
    return write_rows(folder, [{"document": f"text {i}"} for i in range(23)], group=4, files=2)


def test_rows_are_shuffled_differently_each_epoch(rows23):
    groups = open_row_groups(rows23, ["document"], "train")
    assert groups is not None
    rows = [row["document"] for row in groups.read("s", 0, 1, 0, 46)]
    assert rows[:23] != rows[23:]
    assert rows[:23] != sorted(rows[:23])


def test_a_copy_of_rows_reads_no_group_again(rows23, monkeypatch):
    """Tasks that a process does one after the other each bring one."""
    groups, read, once = open_row_groups(rows23, ["document"], "train"), [], RowGroups._read
    parquet._read_group.cache_clear()
    monkeypatch.setattr(RowGroups, "_read", lambda self, group: read.append(group) or once(self, group))
    rows = [list(pickle.loads(pickle.dumps(groups)).read("of its own", 0, 1, 0, 3)) for _ in range(2)]
    assert rows[0] == rows[1]
    assert len(read) == 1
    other = open_row_groups(rows23, ["document"], "train")
    assert other == groups
    other.digest = "another"
    assert other != groups


def test_a_digest_is_of_what_files_hold(tmp_path):
    """As many rows in as many bytes are not the same rows, where an extreme differs."""
    one, two, again = (
        open_row_groups(write_rows(tmp_path / name / "train", [{"document": text}]), ["document"], "train")
        for name, text in (("one", "text 1"), ("two", "text 2"), ("again", "text 1"))
    )
    assert one.digest == again.digest != two.digest


def recipe_of(base, *shares, **fields) -> Recipe:
    hypernetwork = HypernetworkConfig(chunking=ChunkingConfig(max_chunk_tokens=64))
    stage = Stage(10, shares, batch_tokens=320)
    return dataclasses.replace(Recipe(base=base.name, hypernetwork=hypernetwork, stages=(stage,)), **fields)


def test_a_windows_batches_follow_from_its_number_alone(tiny_llama):
    recipe = recipe_of(tiny_llama, Share(NeedleTask(40, 120, keyed=0.5)), batches_per_step=2)
    (stage,) = open_stages(recipe)

    def ids(shard, number):
        batches, _ = stage.window(tiny_llama.tokenizer, shard, number)
        return [chunk.tolist() for batch in batches for d in batch.documents for chunk in d.chunks]

    assert ids(0, 3) == ids(0, 3)
    assert ids(0, 3) != ids(1, 3) != ids(1, 4)


def test_shares_are_of_tokens_and_padding_is_low(tiny_llama, tmp_path):
    rows = [{"document": "word " * (5 + i % 40), "questions": ["q?"], "answers": ["a"]} for i in range(200)]
    data = write_rows(tmp_path / "train", rows, group=50)
    recipe = recipe_of(tiny_llama, Share(QuestionsTask(), 3.0), Share(NeedleTask(40, 60), 1.0), data=data)
    (stage,) = open_stages(recipe)
    tokens: Counter[str] = Counter()
    padded = batches = 0
    for number in range(10):
        for batch in stage.window(tiny_llama.tokenizer, 0, number)[0]:
            tokens[batch.task] += sum(len(chunk) for d in batch.documents for chunk in d.chunks)
            padded += collate(batch, Affixes((), ()), 0).padded_tokens
            batches += 1
    assert tokens["questions"] / tokens.total() == pytest.approx(0.75, abs=0.08)
    assert 1 - tokens.total() / padded < 0.1
    assert batches / 10 == pytest.approx(WINDOW_BATCHES, rel=0.4)


def test_a_share_of_batches_has_questions_of_other_documents(tiny_llama):
    recipe = recipe_of(tiny_llama, Share(FactsTask(1, 2), unrelated=0.4))
    (stage,) = open_stages(recipe)
    batches = [b for number in range(20) for b in stage.window(tiny_llama.tokenizer, 0, number)[0]]
    share = sum(batch.unrelated for batch in batches) / len(batches)
    assert share == pytest.approx(0.4, abs=0.12)
    assert {(b.task, b.unrelated) for b in batches} == {("facts", False), ("unrelated", True)}
    assert all(len(b.documents) > 1 for b in batches if b.unrelated)


@pytest.mark.parametrize("name", ["books.txt", "books.parquet"])
def test_a_digest_of_prose_is_of_what_it_holds_where_it_is_read(tiny_llama, tmp_path, name):
    def digests(share):
        (stage,) = open_stages(recipe_of(tiny_llama, share, prose=str(tmp_path / name)))
        return stage.sources[0].digests()

    def write(text):
        if name.endswith("txt"):
            (tmp_path / name).write_text(text)
        else:
            pq.write_table(pa.table({"text": [text]}), tmp_path / name)

    told = Share(NeedleTask(40, 60, prose=0.5))
    with pytest.raises(UserError, match=f"{name}: no such file"):
        digests(told)
    write("Call me Ishmael.")
    first = digests(told)
    assert list(first) == [str(tmp_path / name)]
    write("Call me Abraham.")
    assert digests(told) != first
    assert digests(Share(NeedleTask(40, 60))) == {}


def test_a_single_file_is_a_training_set(tmp_path):
    write_rows(tmp_path / "train", [{"document": "a", "questions": ["b?"], "answers": ["c"]}])
    (file,) = (tmp_path / "train").iterdir()
    data = str(file.rename(tmp_path / "rows.parquet"))
    assert open_row_groups(data, ["document"], "train").count == 1
    assert open_row_groups(data, ["document"], "dev") is None


def test_a_set_that_is_still_being_made_is_refused(tmp_path):
    data = write_rows(tmp_path / "train", [{"document": "a", "questions": ["b?"], "answers": ["c"]}])
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="`d2l prepare` has not finished it"):
        open_row_groups(data, ["document"], "train")
    (tmp_path / "statistics.json").write_text("{}")
    assert open_row_groups(data, ["document"], "train").count == 1


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("document", [["a"]], "string, it is list of string"),
        ("questions", ["b?"], "list of string, it is string"),
        ("answers", [[1]], "list of string, it is list of number"),
        ("answers", [{"text": ["c"]}], "list of string, it is struct<"),
    ],
)
def test_columns_of_other_types_are_named(tmp_path, column, values, expected):
    good = {"document": ["a"], "questions": [["b?"]], "answers": [["c"]]}
    (tmp_path / "train").mkdir()

    def opened(columns):
        pq.write_table(pa.table(columns), tmp_path / "train/0.parquet")
        return open_row_groups(str(tmp_path), list(good), "train")

    with pytest.raises(UserError, match=rf"/train/0\.parquet: expected column {column} to be {expected}"):
        opened(good | {column: values})
    large = {"document": pa.array(["a"], pa.large_string()), "answers": pa.array([["c"]], pa.large_list(pa.string()))}
    assert opened(good | large).count == 1


def test_what_cannot_be_used_is_counted(tiny_llama, tmp_path):
    good = "The magic number is 12."
    rows = [
        {"document": good, "questions": ["a?", "b?"], "answers": ["1", " "]},
        {"document": good, "questions": ["a?"], "answers": [None]},
        {"document": " ", "questions": ["a?"], "answers": ["1"]},
        {"document": "a\0b", "questions": ["a?"], "answers": ["1"]},
        {"document": "long " * 300, "questions": ["a?"], "answers": ["1"]},
        {"document": "long " * 30_000, "questions": ["a?"], "answers": ["1"]},
        {"document": good, "questions": ["a?"] * 4, "answers": ["1"] * 4},
        {"document": good, "questions": ["a?", "b?"], "answers": ["1"]},
        {"document": good, "questions": None, "answers": ["1"]},
        {"document": good, "questions": None, "answers": None},
        {"document": good, "questions": ["a?", "b?"], "answers": ["1", "long " * 100]},
    ]
    data = write_rows(tmp_path / "train", rows)
    task = QuestionsTask(max_document_tokens=200, max_questions=3)
    source = open_task(task, SourceConfig(ChunkingConfig(), question_tokens=100), "s", data)
    assert source is not None
    documents, skipped = source.documents(tiny_llama.tokenizer, 0, 1, 0, len(rows))
    assert sorted(len(d.prompts) for d in documents) == [1, 1, 3]
    assert +skipped == {
        "questions without an answer": 2,
        "documents without questions": 2,
        "documents with unequal questions and answers": 2,
        "questions longer than question_tokens": 1,
        "empty documents": 1,
        "documents that are no text": 1,
        "documents longer than max_document_tokens": 2,
        "questions beyond max_questions": 1,
    }


def test_stored_targets_belong_to_the_answers_tokens(tiny_llama, tmp_path):
    end = 2  # "12" and the end token
    tokens = len(tiny_llama.tokenizer("12", add_special_tokens=False)["input_ids"]) + 1
    ids, log_probs = list(range(tokens * TOP)), [-0.5] * (tokens * TOP)
    row = {"document": "It is 12.", "questions": ["a?", "b?"], "answers": ["", "12"]}
    row |= {"teacher_ids": [[], ids], "teacher_log_probs": [[], log_probs]}
    assert tokens >= end
    data = write_rows(tmp_path / "train", [row])
    source = open_task(QuestionsTask(targets="teacher"), SourceConfig(ChunkingConfig()), "s", data)
    assert source is not None
    (document,), _ = source.documents(tiny_llama.tokenizer, 0, 1, 0, 1)
    batch = collate(PackedBatch("questions", False, [document]), Affixes((), ()), 0)
    assert batch.teacher_ids is not None
    assert batch.teacher_ids.shape == (tokens, TOP)
    assert batch.teacher_ids[1, 0] == TOP
    assert len(batch.labels) == tokens
    broken = row | {"teacher_ids": [[], ids[TOP:]]}
    source = open_task(
        QuestionsTask(targets="teacher"),
        SourceConfig(ChunkingConfig()),
        "s",
        write_rows(tmp_path / "other/train", [broken]),
    )
    with pytest.raises(UserError, match="another base model"):
        source.documents(tiny_llama.tokenizer, 0, 1, 0, 1)  # type: ignore[union-attr]
    uneven = row | {"teacher_log_probs": [log_probs]}
    source = open_task(
        QuestionsTask(targets="teacher"),
        SourceConfig(ChunkingConfig()),
        "s",
        write_rows(tmp_path / "uneven/train", [uneven]),
    )
    documents, skipped = source.documents(tiny_llama.tokenizer, 0, 1, 0, 1)  # type: ignore[union-attr]
    assert not documents
    assert skipped["documents with unequal questions and targets"] == 1


def test_no_question_is_longer_than_its_stages_budget(tiny_llama, tmp_path):
    rows = [{"document": "It is 12.", "questions": ["a?", "b?"], "answers": ["12", "12 " * 400]}] * 3
    for split in ("train", "dev"):
        data = write_rows(tmp_path / split, rows)
    recipe = recipe_of(tiny_llama, Share(QuestionsTask()), data=data, dev_documents=2)
    stages = tuple(dataclasses.replace(stage, question_tokens=300) for stage in recipe.stages)
    recipe = dataclasses.replace(recipe, stages=stages)
    (stage,) = open_stages(recipe)
    batches, skipped = stage.window(tiny_llama.tokenizer, 0, 0)
    assert skipped["questions longer than question_tokens"] > 0
    for batch in batches + dev_batches(recipe, tiny_llama.tokenizer)["questions"]:
        assert all(len(d.answers) == 1 and len(d.prompts[0]) + len(d.answers[0]) <= 300 for d in batch.documents)


def test_a_document_to_repeat_is_cut_and_is_its_own_answer(tiny_llama, tmp_path):
    data = write_rows(tmp_path / "train", [{"document": "The magic number of the blue harbour is 4821. " * 20}])
    source = open_task(RepeatTask(max_tokens=30), SourceConfig(ChunkingConfig()), "s", data)
    assert source is not None
    (document,), skipped = source.documents(tiny_llama.tokenizer, 0, 1, 0, 1)
    (chunk,), (answer,) = document.chunks, document.answers
    assert 28 <= len(chunk) <= 32
    assert answer.tolist() == [*chunk.tolist(), tiny_llama.tokenizer.eos_token_id]
    assert skipped["documents cut to max_tokens"] == 1


def test_text_that_nobody_asks_for_goes_on_from_its_first_token(tiny_llama, tmp_path):
    text = "The magic number of the blue harbour is 4821. Remember it."
    for split in ("train", "dev"):
        data = write_rows(tmp_path / split, [{"document": text}])
    for held_out in (False, True):
        config = SourceConfig(ChunkingConfig(), held_out=held_out)
        source = open_task(RepeatTask(asked=False), config, "s", data)
        assert source is not None
        (document,), _ = source.documents(tiny_llama.tokenizer, 0, 1, 0, 1)
        (chunk,), (prompt,), (answer,) = document.chunks, document.prompts, document.answers
        assert prompt.tolist() == chunk[:1].tolist()
        assert answer.tolist() == [*chunk[1:].tolist(), tiny_llama.tokenizer.eos_token_id]
    assert document.text is not None
    _, (first,), (rest,) = document.text
    assert first + rest == text


def test_documents_are_cut_into_as_many_chunks_as_drawn(tiny_llama):
    config = SourceConfig(ChunkingConfig(max_chunk_tokens=500), chunk_counts=(0.0, 0.0, 1.0))
    source = open_task(NeedleTask(90, 90), config, "s", None)
    assert source is not None
    documents, _ = source.documents(tiny_llama.tokenizer, 0, 1, 0, 5)
    assert {len(d.chunks) for d in documents} == {3}


def test_evaluation_is_on_other_documents(tiny_llama, tmp_path):
    rows = [{"document": f"Number {i}.", "questions": ["q?"], "answers": [str(i)]} for i in range(6)]
    write_rows(tmp_path / "train", rows[:4])
    data = write_rows(tmp_path / "dev", rows[4:])
    recipe = recipe_of(tiny_llama, Share(QuestionsTask()), Share(NeedleTask(40, 60)), data=data, dev_documents=2)
    dev = dev_batches(recipe, tiny_llama.tokenizer)
    texts = [d.text[0] for batch in dev["questions"] for d in batch.documents if d.text]
    assert sorted(texts) == ["Number 4.", "Number 5."]
    (stage,) = open_stages(recipe)
    held_out = [c.tolist() for batch in dev["needle_60"] for d in batch.documents for c in d.chunks]
    used = [
        c.tolist() for batch in stage.window(tiny_llama.tokenizer, 0, 0)[0] for d in batch.documents for c in d.chunks
    ]
    assert len(held_out) == 2
    assert not any(chunk in used for chunk in held_out)


def test_ordinary_text_is_never_learned_with_its_own_adapter(tiny_llama, tmp_path):
    rows = [{"document": f"The magic number of harbour {i} is {i * 37}. " * (1 + i % 3)} for i in range(40)]
    data = write_rows(tmp_path / "train", rows)
    ordinary = Share(RepeatTask(asked=False, max_tokens=100), unrelated=1.0)
    (stage,) = open_stages(recipe_of(tiny_llama, ordinary, data=data))
    batches, skipped = [], Counter()
    for number in range(20):
        made, reasons = stage.window(tiny_llama.tokenizer, 0, number)
        batches += made
        skipped += reasons
    assert batches
    assert all(batch.unrelated and len(batch.documents) > 1 for batch in batches)
    assert skipped["documents without an unrelated one in their batch"] > 0


def test_ordinary_texts_that_do_not_share_a_batch_are_refused(tiny_llama, tmp_path):
    data = write_rows(tmp_path / "train", [{"document": "It is 37 of them. " * 200}])
    long = Share(RepeatTask(asked=False, max_tokens=300), unrelated=1.0)
    with pytest.raises(UserError, match=r"two documents, of some \d+ tokens, to a batch, and batch_tokens is 320"):
        open_stages(recipe_of(tiny_llama, long, data=data))


def test_a_teacher_adds_targets_to_windows_in_their_order(tiny_llama, tmp_path):
    """A block of several windows, of several shards."""
    rows = [
        {"document": f"Number {i} is {i}.", "questions": [f"{i}?"], "answers": ["1" * (i % 7 + 1)]} for i in range(40)
    ]
    data = write_rows(tmp_path / "train", rows)
    share = Share(QuestionsTask(targets="teacher", teacher="stream"))
    (stage,) = open_stages(recipe_of(tiny_llama, share, data=data, batches_per_step=2))
    places = {"shard": np.array([0, 1, 0, 1]), "window": np.array([0, 0, 1, 1])}
    block = pa.concat_tables(stream._make_windows(places, stage))
    taught = stream._AddTargets(tiny_llama.name, "cpu", 1).add(block)
    assert [taught[name].to_pylist() for name in places] == [found.tolist() for found in places.values()]
    for before, after in zip(block["batches"].to_pylist(), taught["batches"].to_pylist(), strict=True):
        (given, _), (learned, _) = pickle.loads(before), pickle.loads(after)
        documents = [[document for batch in batches for document in batch.documents] for batches in (given, learned)]
        for plain, targeted in zip(*documents, strict=True):
            assert np.concatenate(targeted.chunks).tolist() == np.concatenate(plain.chunks).tolist()
            assert [len(targets.ids) for targets in targeted.targets] == [len(answer) for answer in plain.answers]


def test_evaluation_is_without_tasks_whose_questions_are_all_unrelated(tiny_llama, tmp_path):
    for split in ("train", "dev"):
        data = write_rows(tmp_path / split, [{"document": f"The magic number is {i}."} for i in range(4)])
    ordinary = Share(RepeatTask(asked=False), unrelated=1.0)
    recipe = recipe_of(tiny_llama, Share(NeedleTask(40, 60)), ordinary, data=data, dev_documents=2)
    assert set(dev_batches(recipe, tiny_llama.tokenizer)) == {"needle_60"}
    asked = dataclasses.replace(ordinary, unrelated=0.5)
    recipe = recipe_of(tiny_llama, Share(NeedleTask(40, 60)), asked, data=data, dev_documents=2)
    assert set(dev_batches(recipe, tiny_llama.tokenizer)) == {"needle_60", "repeat"}


def test_only_what_is_left_out_of_evaluation_is_warned_of(tiny_llama, tmp_path, caplog):
    good = {"document": "It is 12.", "questions": ["a?"], "answers": ["12"]}
    for split in ("train", "dev"):
        data = write_rows(tmp_path / split, [good] * 2)
    recipe = recipe_of(tiny_llama, Share(QuestionsTask()), data=data, dev_documents=4)
    dev_batches(recipe, tiny_llama.tokenizer)
    assert "evaluation" not in caplog.text
    write_rows(tmp_path / "dev", [good, good | {"document": " "}])
    dev_batches(recipe, tiny_llama.tokenizer)
    assert "questions: evaluation in the course of training leaves out or cuts: 2 empty documents" in caplog.text


def test_facts_that_evaluation_asks_for_are_of_other_names(tiny_llama):
    task = FactsTask(min_facts=2, max_facts=6, sentences=0.5)
    recipe = recipe_of(tiny_llama, Share(task), dev_documents=8)
    held_out = [d.text for batch in dev_batches(recipe, tiny_llama.tokenizer)["facts"] for d in batch.documents]
    source = open_task(task, SourceConfig(ChunkingConfig()), "s", None)
    assert source is not None
    documents, _ = source.documents(tiny_llama.tokenizer, 0, 1, 0, 200)
    assert {len(d.prompts) for d in documents} == {2, 3, 4, 5, 6}
    decode = tiny_llama.tokenizer.decode
    trained = {decode(prompt) for d in documents for prompt in d.prompts}
    asked = [question for text in held_out if text for question in text[1]]
    assert len(asked) >= 16
    assert not any(question in prompt for question in asked for prompt in trained)


def test_labels_are_the_answers_tokens_after_the_places_they_follow(tiny_llama):
    source = open_task(NeedleTask(90, 90, keyed=1.0), SourceConfig(ChunkingConfig(max_chunk_tokens=64)), "s", None)
    assert source is not None
    documents, _ = source.documents(tiny_llama.tokenizer, 0, 1, 0, 3)
    batch = collate(PackedBatch("needle", True, documents), Affixes((1,), (2, 2)), 0)
    flat = batch.ids.flatten()
    assert flat[batch.places + 1].tolist() == batch.labels.tolist()
    assert batch.questions == [len(d.prompts) for d in documents]
    assert batch.chunks_per_document == [2, 2, 2]
    assert batch.tokens == sum(len(c) for d in documents for c in d.chunks)


def test_answers_are_found_in_their_documents(tokenizer):
    """Two chunks a document; where an answer's token was found, it comes next, but for spaces and capitals."""
    config = SourceConfig(ChunkingConfig(), chunk_counts=(0.0, 1.0), locate=True)
    source = open_task(FactsTask(4, 4, sentences=0.0), config, "s", None)
    assert source is not None
    documents, _ = source.documents(tokenizer, 0, 1, 0, 10)
    batch = collate(PackedBatch("facts", True, documents), Affixes((1, 1, 1), (2, 2)), 0)
    assert batch.found is not None
    tokens, rows, columns = batch.found.T
    assert batch.chunks.content[rows, columns + 1].all()
    ends = np.cumsum(batch.answer_lengths) - 1
    firsts = ends + 1 - batch.answer_lengths
    for token, row, column in batch.found.tolist():
        read, said = (tokenizer.decode(ids).strip() for ids in (batch.chunks.ids[row, column + 1], batch.labels[token]))
        shared = min(len(read), len(said)) if token in firsts else None
        assert read[:shared].casefold() == said[:shared].casefold()
    found = set(tokens.tolist())
    assert not found & set(ends.tolist())
    asked = np.repeat(np.arange(10), batch.questions)
    for first, end, owner in zip(firsts, ends, asked, strict=True):
        answer = tokenizer.decode(batch.labels[first:end]).strip().casefold()
        whole = any(answer in tokenizer.decode(chunk).casefold() for chunk in documents[owner].chunks)
        assert first in found or not whole  # some are cut in two
    assert len(found) > 0.7 * (len(batch.labels) - len(ends))
    owners = asked.repeat(batch.answer_lengths)
    assert (owners[tokens] == np.arange(10).repeat(batch.chunks_per_document)[rows]).all()


def recipe_of_needles(max_tokens, batch_tokens):
    stage = Stage(1, (Share(NeedleTask(40, max_tokens)),), batch_tokens=batch_tokens)
    return dataclasses.replace(recipes.needle(), stages=(stage,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeedleTask(50, 40), "min_tokens <= max_tokens"),
        (lambda: FactsTask(3, 2), "min_facts <= max_facts"),
        (lambda: recipe_of_needles(500, batch_tokens=400), "documents of 500 tokens.* do not fit batch_tokens 400"),
        (lambda: recipe_of_needles(400, batch_tokens=400), "400 tokens, 424 with overlaps of chunks"),
        (lambda: Share(NeedleTask(), unrelated=0.1), "asks every document the same"),
        (lambda: Share(RepeatTask(), unrelated=1.0), "RepeatTask asks every document the same"),
        (lambda: Share(FactsTask(), unrelated=1.5), "from 0 to 1, got 1.5"),
        (lambda: Stage(1, ()), "tasks with weights above 0"),
        (lambda: Recipe(), "no steps"),
        (lambda: open_task(QuestionsTask(), SourceConfig(ChunkingConfig()), "s", None), "needs a training set"),
        (lambda: open_row_groups("/no/such", ["document"], "train"), "no training set"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_paths_hold_in_the_folders_that_workers_run_in(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "books.txt").write_text("One.")
    monkeypatch.chdir(tmp_path)
    tasks = QuestionsTask(), QuestionsTask("set"), RepeatTask("s3://bucket/set"), FactsTask()
    recipe = Recipe("hub/model", stages=(Stage(1, tuple(map(Share, tasks))),), data="set", prose="books.txt")
    whole = _anywhere(recipe)
    assert (whole.base, whole.data, whole.prose) == ("hub/model", f"{tmp_path}/set", f"{tmp_path}/books.txt")
    moved = [share.task for share in whole.stages[0].mixture]
    assert moved == [tasks[0], QuestionsTask(f"{tmp_path}/set"), *tasks[2:]]
