"""Tokens to text as they come: text leaves only when no later token can change it and no stop string can cut it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a decoder shows for a character whose bytes are not all there."""


class TextStream:
    """The text of one answer. Its pieces join to the decoded tokens, cut before the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()):
        self.stopped = False
        """Whether a stop string was reached: there is no more text."""
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        # Tokens are decoded from the last but one point where text left: decoders treat the first token specially,
        # and decoding the whole answer each time would be quadratic in its length.
        self._start = self._settled = 0
        self._held = ""

    def push(self, token: int) -> str:
        """The text that `token` sets free, often none."""
        self._ids.append(token)
        self._held += self._decode(complete=True)
        return self._release(len(self._held) - self._tail())

    def flush(self) -> str:
        """What is left at the end of the answer."""
        self._held += self._decode(complete=False)
        return self._release(len(self._held))

    def _decode(self, complete: bool) -> str:
        """Text of the tokens since the last call; none, if it must be complete and is not."""
        before = self._text(self._start, self._settled)
        text = self._text(self._start, len(self._ids))
        new = text[len(before) :]
        if not new or (complete and new.endswith(_INCOMPLETE)):
            return ""
        self._start, self._settled = self._settled, len(self._ids)
        return new

    def _text(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _tail(self) -> int:
        """Length of the longest end of the held text that may become a stop string."""
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)

    def _release(self, end: int) -> str:
        """The first `end` characters held, or those before a stop string."""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, end = True, min(found)
        text, self._held = self._held[:end], "" if found else self._held[end:]
        return text
