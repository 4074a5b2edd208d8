"""Products of one thread do not change those of another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from d2l.precision import bfloat16_products, float32_products


def test_float32_products_wait_until_no_other_thread_has_them_shortened() -> None:
    setting = torch.backends.mkldnn.matmul
    shortened, released, before = threading.Event(), threading.Event(), setting.fp32_precision

    def shorten() -> str:
        with bfloat16_products():
            shortened.set()
            released.wait(0.2)
            return setting.fp32_precision

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(shorten)
        assert shortened.wait(10)
        with float32_products():
            assert setting.fp32_precision == before
        assert other.result() == "bf16" != before
