"""Times what else multiplies groups on a GPU: one cuBLAS product of the same total, and torch._grouped_mm.

The same shapes and the same method as gemm.cu: normal random data, weights larger than L2, the median of 7
batches of 10 launches. Run both on one machine, one after the other.
"""

from __future__ import annotations

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
    print(f"copy {2 * x.numel() * 4 / us / 1e3:.0f} GB/s read plus written", flush=True)


def measure(m: int, k: int, n: int, groups: int) -> None:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(groups, k, n, device="cuda", dtype=torch.bfloat16) / k**0.5
    sizes = np.random.default_rng(0).multinomial(m, np.ones(groups) / groups)
    offsets = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)
    calls: dict[str, Callable[[int], object]] = {
        "dense": lambda i: x @ w[i % groups],
        "dense input grad": lambda i: dy @ w[i % groups].t(),
        "dense weight grad": lambda _: x.t() @ dy,
        "torch._grouped_mm": lambda _: torch._grouped_mm(x, w, offs=offsets),
        "torch input grad": lambda _: torch._grouped_mm(dy, w.transpose(1, 2), offs=offsets),
        "torch weight grad": lambda _: torch._grouped_mm(x.t(), dy, offs=offsets),
    }
    for name, call in calls.items():
        us = microseconds(call)
        tflops = 2e-6 * m * k * n / us
        print(f"{m:6} {k:6} {n:6} {groups:4} {name:24} {us:9.1f} us {tflops:7.1f} TFLOP/s", flush=True)


if __name__ == "__main__":
    measure_copy()
    for _shape in SHAPES:
        measure(*_shape)
