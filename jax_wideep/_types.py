"""Array aliases and the legend of axis names used in every signature.

| axis | meaning |
|---|---|
| `tokens` | tokens of one rank (T) |
| `hidden` | hidden size (H) |
| `k` | experts chosen per token (top-k) |
| `experts` | experts over all ranks (E) |
| `physical` | experts that a group has, replicas counted (P); without a placement P = E |
| `max_replicas` | most physical experts of a logical one |
| `local_experts` | experts that one rank hosts, P / R |
| `capacity` | rows that a rank can receive in the throughput shape |
| `ranks` | ranks of the group (R) |
| `expert_rows` | ranks * chunk: rows per local expert in the low-latency shape |
| `ffn` | inner size of an expert |
"""

from jax import Array
from jaxtyping import Bool, Float, Float32, Int32, Num

__all__ = ["Array", "Bool", "Float", "Float32", "Int32", "Num"]
