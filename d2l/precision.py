"""How CPUs multiply float32 matrices: a setting of the whole process, so who depends on it holds it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_held = threading.RLock()


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Float32 products take their operands for bfloat16 ones, which is far faster where that is what they hold."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _held:
        before, setting.fp32_precision = setting.fp32_precision, "bf16"
        try:
            yield
        finally:
            setting.fp32_precision = before


@contextmanager
def float32_products() -> Iterator[None]:
    """Float32 products are what they say: no other thread changes that meanwhile."""
    with _held:
        yield
