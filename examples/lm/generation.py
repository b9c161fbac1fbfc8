"""Decoding: prompts in the throughput shape, then token by token in the low-latency shape, with times."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_wideep.flax.transformer import Transformer, compile_steps
from lm.training import put_batch


@dataclasses.dataclass(frozen=True)
class Generated:
    """Decoded tokens and how long they took, compilation left out.

    Attributes:
      tokens: [batch, new] ids, of the sequences on this process's devices.
      sequences: over all processes.
      prompt_tokens: tokens read by prefill, over all sequences.
      prefill_s: seconds that prefill took.
      step_s: [new - 1] seconds of each decode step, choosing the token included.
    """

    tokens: np.ndarray
    sequences: int
    prompt_tokens: int
    prefill_s: float
    step_s: np.ndarray

    def latency_ms(self, percent: float) -> float:
        """A percentile of the steps' times, in milliseconds."""
        return float(np.percentile(self.step_s, percent)) * 1e3

    def summary(self) -> str:
        """Two lines for people."""
        batch, new = self.sequences, self.tokens.shape[1]
        percentiles = ", ".join(f"p{percent} {self.latency_ms(percent):.2f} ms" for percent in (50, 90, 99))
        return (
            f"prefill  {self.prompt_tokens} tokens in {self.prefill_s * 1e3:.1f} ms: "
            f"{self.prompt_tokens / self.prefill_s:,.0f} tokens/s\n"
            f"decode   {batch} sequences x {new - 1} steps: latency per token {percentiles}; "
            f"{batch * (new - 1) / np.sum(self.step_s):,.0f} tokens/s"
        )


def generate(
    model: Transformer,
    prompts: np.ndarray,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[np.ndarray, float], None] | None = None,
) -> Generated:
    """Continues prompts of one length.

    Args:
      model: the model.
      prompts: [batch, length] ids.
      new_tokens: tokens to add to each.
      temperature: of sampling; 0 takes the likeliest token.
      seed: of sampling.
      on_token: called after every step with the [batch] new ids and the step's seconds.
    """
    prefill, decode_step = compile_steps(model)
    choose = jax.jit(functools.partial(_choose, temperature=temperature))
    batch, length = prompts.shape
    # On the host, from where every process gives them to all its devices.
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), new_tokens)))
    prompt = put_batch(model, prompts.astype(np.int32))

    # Once for the compiler, on a cache that is thrown away.
    logits, cache = prefill(prompt, model.init_cache(batch, length + new_tokens))
    jax.block_until_ready(decode_step(choose(logits, keys[0]), cache))

    cache = jax.block_until_ready(model.init_cache(batch, length + new_tokens))
    started = time.perf_counter()
    logits, cache = jax.block_until_ready(prefill(prompt, cache))
    prefill_s = time.perf_counter() - started

    token = choose(logits, keys[0])
    tokens, step_s = [_local(token)], []
    for key in keys[1:]:
        started = time.perf_counter()
        logits, cache = decode_step(token, cache)
        token = choose(logits, key)
        tokens.append(_local(token))
        step_s.append(time.perf_counter() - started)
        if on_token is not None:
            on_token(tokens[-1], step_s[-1])
    return Generated(np.stack(tokens, axis=1), batch, prompts.size, prefill_s, np.asarray(step_s))


def _choose(logits: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(jax.random.wrap_key_data(key), logits / temperature).astype(jnp.int32)


def _local(tokens: jax.Array) -> np.ndarray:
    if tokens.is_fully_addressable:
        return np.asarray(tokens)
    return np.concatenate([np.asarray(shard.data) for shard in tokens.addressable_shards])
