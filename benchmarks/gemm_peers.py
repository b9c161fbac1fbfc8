"""Times what else multiplies groups on a GPU: one cuBLAS product of the same total, and torch._grouped_mm.

The same shapes and the same method as gemm.cu: normal random data, weights larger than L2, the median of 7
batches of 10 launches. Run both on one machine, one after the other. Prints JSON lines.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import numpy as np
import torch

SHAPES = [
    (8192, 7168, 4096, 32),
    (32768, 7168, 4096, 32),
    (32768, 2048, 7168, 32),
    (32768, 2048, 1536, 16),
    (256, 7168, 4096, 32),
    (1024, 7168, 4096, 32),
]


def microseconds(call: Callable[[int], object]) -> float:
    times = []
    for batch in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(10):
            call(i)
        end.record()
        torch.cuda.synchronize()
        if batch > 0:
            times.append(begin.elapsed_time(end) * 100)
    return statistics.median(times)


def measure_copy() -> None:
    x = torch.randn(1 << 30, device="cuda")
    y = torch.empty_like(x)
    us = microseconds(lambda _: y.copy_(x))
    gigabytes_per_s = round(2 * x.numel() * 4 / us / 1e3)
    print(json.dumps({"program": "copy", "read plus written, GB/s": gigabytes_per_s}), flush=True)


def measure(m: int, k: int, n: int, groups: int) -> None:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(groups, k, n, device="cuda", dtype=torch.bfloat16) / k**0.5
    sizes = np.random.default_rng(0).multinomial(m, np.ones(groups) / groups)
    offsets = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)
    calls: dict[tuple[str, str], Callable[[int], object]] = {
        ("cuBLAS dense", "forward"): lambda i: x @ w[i % groups],
        ("cuBLAS dense", "input grad"): lambda i: dy @ w[i % groups].t(),
        ("cuBLAS dense", "weight grad"): lambda _: x.t() @ dy,
        ("torch._grouped_mm", "forward"): lambda _: torch._grouped_mm(x, w, offs=offsets),
        ("torch._grouped_mm", "input grad"): lambda _: torch._grouped_mm(dy, w.transpose(1, 2), offs=offsets),
        ("torch._grouped_mm", "weight grad"): lambda _: torch._grouped_mm(x.t(), dy, offs=offsets),
    }
    for (program, product), call in calls.items():
        shape = {"m": m, "k": k, "n": n, "groups": groups, "sizes": "uniform"}
        us = round(microseconds(call), 1)
        print(json.dumps({"program": program, "product": product, **shape, "us": us}), flush=True)


if __name__ == "__main__":
    measure_copy()
    for _shape in SHAPES:
        measure(*_shape)
