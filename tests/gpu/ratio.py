"""Compares two runs of benchmarks/exchange_gpu.py, op by op and all together.

python tests/gpu/ratio.py one.jsonl other.jsonl
"""

import json
import sys


def read(path: str) -> dict[str, float]:
    """Microseconds by op, form and sizes."""
    keys = ("op", "form", "tokens", "hidden", "top_k", "num_sms", "routing")
    with open(path) as file:
        figures = [json.loads(line) for line in file]
    return {" ".join(str(figure[key]) for key in keys): figure["us"] for figure in figures}


def main() -> int:
    one, other = (read(path) for path in sys.argv[1:3])
    if not one or one.keys() != other.keys():
        print(
            f"expected the same figures in both, got {sorted(one.keys() ^ other.keys())} in one of them only"
        )
        return 1
    rows = [*((key, one[key], other[key]) for key in one), ("all", sum(one.values()), sum(other.values()))]
    for key, before, after in rows:
        print(f"{key:60} {before:9.1f} us {after:9.1f} us {after / before:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
