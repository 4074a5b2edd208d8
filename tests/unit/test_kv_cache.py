"""Keys and values in slabs: attention as the library's own, whatever comes, goes and moves."""

import threading

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from d2l.base_model import BaseModel, load_base_model
from d2l.errors import UserError
from serve.engine.kv_cache import KVCache, attending
from tests.conftest import save_tiny


def run(base: BaseModel, cache: KVCache, new: dict) -> dict:
    """Run the new tokens of some places; the last logits of each."""
    step = cache.plan({place: len(tokens) for place, tokens in new.items()})
    ids = torch.tensor([[token for place in step.places for token in new[place]]])
    positions = [n for place in step.places for n in range(place.length, place.length + len(new[place]))]
    with torch.no_grad(), attending(base):
        logits_TV = base.model(ids, position_ids=torch.tensor([positions]), use_cache=False, step=step).logits[0]
    ends = torch.tensor([len(new[place]) for place in step.places]).cumsum(0) - 1
    for place in step.places:
        place.length += len(new[place])
    return dict(zip(step.places, logits_TV[ends], strict=True))


def expected(base: BaseModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return base.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def random_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check(base: BaseModel) -> None:
    """Rows of several slabs, that come, go, and are read in pieces beside those that decode."""
    cache = KVCache(base)
    texts: dict = {}
    random = torch.Generator().manual_seed(0)
    for turn in range(30):
        if turn % 2 == 0 and len(texts) < 6:
            texts[cache.add([100, 300][turn % 4 // 2])] = []
        if turn % 7 == 6:
            place = list(texts)[turn % len(texts)]
            cache.remove(place)
            del texts[place]
        counts = torch.randint(0, 4, (len(texts),), generator=random).tolist()
        new = {place: random_tokens(n, turn) for place, n in zip(texts, counts, strict=True) if n}
        if not new:
            continue
        for place, logits_V in run(base, cache, new).items():
            texts[place] += new[place]
            torch.testing.assert_close(logits_V, expected(base, texts[place]), atol=1e-4, rtol=0)


def test_attention_is_the_library_s(tiny_base: BaseModel):
    check(tiny_base)


def test_a_sliding_window_slides(tmp_path_factory: pytest.TempPathFactory):
    folder = save_tiny(tmp_path_factory.mktemp("sliding"), MistralForCausalLM, MistralConfig, sliding_window=4)
    check(load_base_model(str(folder), dtype="float32", device="cpu"))


def test_the_model_is_left_as_it_was(tiny_llama: BaseModel):
    before = expected(tiny_llama, [5, 6, 7])
    with pytest.raises(ZeroDivisionError), attending(tiny_llama):
        raise ZeroDivisionError
    assert torch.equal(expected(tiny_llama, [5, 6, 7]), before)


def test_batches_of_two_threads_leave_the_model_as_it_was(tiny_llama: BaseModel) -> None:
    before = tiny_llama.model.config._attn_implementation
    inside, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def attend(number: int) -> None:
        with attending(tiny_llama):
            inside[number].set()
            leave[number].wait(10)

    threads = [threading.Thread(target=attend, args=[number]) for number in (0, 1)]
    threads[0].start()
    assert inside[0].wait(10)
    threads[1].start()
    assert not inside[1].wait(0.2)  # were it inside too, it would leave what it found
    for event, thread in zip(leave, threads, strict=True):
        event.set()
        thread.join()
    assert inside[1].is_set()
    assert tiny_llama.model.config._attn_implementation == before


def test_room_is_given_up_when_most_rows_have_left(tiny_llama: BaseModel) -> None:
    cache = KVCache(tiny_llama)
    places = [cache.add(100) for _ in range(16)]
    texts = {place: random_tokens(5, seed) for seed, place in enumerate(places)}
    run(tiny_llama, cache, texts)
    (slab,) = {place.slab for place in places}
    whole = slab.data.nbytes
    for place in places[:14]:
        cache.remove(place)
    assert slab.data.nbytes <= whole // 4
    for place, logits_V in run(tiny_llama, cache, {place: [7] for place in places[14:]}).items():
        torch.testing.assert_close(logits_V, expected(tiny_llama, [*texts[place], 7]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("attn_logit_softcapping", 50.0, "softcapping"),
        ("layer_types", ["full_attention", "linear_attention"] * 2, "linear_attention"),
    ],
)
def test_attention_that_would_be_computed_wrongly_is_refused(
    tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch, field: str, value: object, said: str
) -> None:
    monkeypatch.setattr(tiny_llama.model.config, field, value, raising=False)
    with pytest.raises(UserError, match=f"attention with {said} is not for this engine; give --vllm"):
        KVCache(tiny_llama)
