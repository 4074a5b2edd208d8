"""Where a document says an answer."""

import itertools
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


def locate(answer: Sequence[int], chunks: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """See `Document.found`. The end token is nowhere.

    After a space words are often other tokens: "ĠLisbon" where the answer begins "L"; and so they are where a sentence
    begins: "Slate" for "slate". Then the answer's first token is looked for where the word begins, and the others as
    far as both end alike.
    """
    said = tuple(answer[:-1])
    text, wholes, places = tokenizer.decode(said), {said}, []
    for form in (text, text[:1].upper() + text[1:]):
        bare, spaced = (tuple(tokenizer(s + form, add_special_tokens=False)["input_ids"]) for s in ("", " "))
        wholes |= {bare} if spaced[-len(bare) :] == bare else {bare, spaced}
    for wanted, (number, chunk) in itertools.product(wholes if said else (), enumerate(chunks)):
        if len(wanted) > len(chunk):
            continue
        ends = zip(reversed(said), reversed(wanted), strict=False)
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
        offsets = {0: 0} | {len(said) - i: len(wanted) - i for i in range(1, alike + 1)}
        windows = np.lib.stride_tricks.sliding_window_view(chunk, len(wanted))
        for start in np.flatnonzero((windows == wanted).all(1)):
            places += [(token, number, start + offset - 1) for token, offset in offsets.items()]
    return np.array(places, np.int32).reshape(-1, 3)
