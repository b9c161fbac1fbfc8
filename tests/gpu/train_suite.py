"""Training steps of the language model of examples/, with a process for each rank, against the same on CPU devices.

    WIDEEP_CPU_RANKS=8 WIDEEP_BACKEND=xla python tests/gpu/train_suite.py --save /tmp/training.npz
    python tests/gpu/launch.py 8 tests/gpu/train_suite.py --reference /tmp/training.npz

Ranks that share a GPU have no collectives of XLA's. So every rank differentiates the loss of its own sequences with
respect to its own copy of what is replicated; those gradients are averaged on the host, in order of rank, through files
of the job's folder. The experts' gradients come from all ranks by way of the exchange. Parameters are bfloat16, AdamW
works on float32 weights, as `train_lm.py --dtype bfloat16` does.

Compared are the losses of every rank in every step, and every rank's gradients in the first one: within bfloat16's
rounding, since products sum in another order, and a router may decide otherwise where two experts are near each other.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from world import AXIS, World

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
from lm.training import ModelSizes, next_byte_loss, with_float32_weights

from jax_wideep.flax.transformer import Transformer

STEPS, SEQUENCES, SEQ = 6, 4, 64
# Room for twice eight ranks' rows on one: nothing is dropped.
SIZES = ModelSizes(hidden=128, layers=2, ffn=128, capacity_factor=16.0, dtype="bfloat16")
LOSS_TOLERANCE = 1e-2  # relative, each rank and step
GRADIENT_TOLERANCE = 0.1  # of a parameter's largest gradient: the mean difference over its numbers
EXPERTS = ("wi", "wo")  # spread over the ranks; all others are replicated

Arrays = dict[str, Any]


class Job:
    """The model's structure, and a compiled step over its parameters by name."""

    def __init__(self, world: World):
        self.world = world
        config = SIZES.config()
        self.group = config.make_group(world.mesh, AXIS, backend=world.backend, deadline_s=60.0)
        self._make = lambda: Transformer(config, self.group, rngs=nnx.Rngs(0))
        graph, state = nnx.split(nnx.eval_shape(self._make))
        variables = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
        self._optimizer = with_float32_weights(optax.adamw(3e-3, b1=0.9, b2=0.95, weight_decay=0.01))

        def loss_of(params: Arrays, tokens: jax.Array) -> jax.Array:
            filled = [(path, leaf.replace(params[name])) for name, (path, leaf) in variables.items()]
            model = nnx.merge(graph, nnx.from_flat_state(filled))
            return next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:])

        def gradients(params: Arrays, tokens: jax.Array) -> tuple[jax.Array, Arrays]:
            loss, grads = jax.value_and_grad(loss_of)(params, tokens)
            return loss[None], grads

        def update(params: Arrays, grads: Arrays, state: Any) -> tuple[Arrays, Any]:
            changes, state = self._optimizer.update(grads, unfold(state), params)
            return optax.apply_updates(params, changes), fold(state)

        self.gradients = world.on_ranks(gradients)
        self.update = world.on_ranks(update)
        self.start = world.on_ranks(lambda params: fold(self._optimizer.init(params)))

    def initial(self) -> Arrays:
        """Weights by name; those of experts whole, [experts, ..]. On devices of one process only."""
        state = nnx.state(self._make())
        return {
            ".".join(map(str, path)): np.asarray(leaf[...], np.float32)
            for path, leaf in nnx.to_flat_state(state)
        }

    def put(self, weights: Arrays) -> Arrays:
        """On devices in bfloat16, each rank with a copy of its own of what is replicated."""
        placed = {}
        for name, array in weights.items():
            ranks = self.world.num_ranks
            of_ranks = (
                array.reshape(ranks, -1, *array.shape[1:]) if is_expert(name) else stack([array] * ranks)
            )
            placed[name] = self.world.put(of_ranks.astype(jnp.bfloat16))
        return placed


def is_expert(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in EXPERTS


def stack(arrays: list[np.ndarray]) -> np.ndarray:
    return np.broadcast_to(np.stack(arrays), (len(arrays), *arrays[0].shape))


def fold(tree: Any) -> Any:
    """Scalars leave a shard_map as arrays of one number."""
    return jax.tree.map(lambda leaf: leaf[None] if leaf.ndim == 0 else leaf, tree)


def unfold(state: Any) -> Any:
    """Undoes `fold` for an optimiser's counters; no parameter is a vector of one number."""
    return jax.tree.map(lambda leaf: leaf[0] if leaf.shape == (1,) else leaf, state)


def batches(world: World) -> list[np.ndarray]:
    """[ranks, sequences, seq + 1] of every step."""
    text = np.frombuffer(b"".join(sorted(read_text())), np.uint8)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(text) - SEQ - 1, (STEPS, world.num_ranks, SEQUENCES))
    return list(text[starts[..., None] + np.arange(SEQ + 1)].astype(np.int32))


def read_text() -> list[bytes]:
    """The project's own documentation, which is the same wherever the two runs take place."""
    folder = pathlib.Path(__file__).parents[2] / "docs"
    return [path.read_bytes() for path in folder.glob("*.md")]


def of_all_ranks(world: World, name: str, own: dict[int, Arrays]) -> list[Arrays]:
    """Everybody's arrays in order of rank, through files of the job's folder."""
    if world.num_processes == 1:
        return [own[rank] for rank in range(world.num_ranks)]
    folder = pathlib.Path(os.environ["WIDEEP_SCRATCH"])
    for rank, arrays in own.items():
        np.savez(folder / f"{name}_{rank}.npz", **arrays)
    world.barrier()
    return [dict(np.load(folder / f"{name}_{rank}.npz")) for rank in range(world.num_ranks)]


def local_arrays(world: World, arrays: Arrays) -> dict[int, Arrays]:
    """By rank of this process, float32."""
    by_rank: dict[int, Arrays] = {rank: {} for rank in world.local_ranks}
    for name, array in arrays.items():
        for rank, values in world.local(array).items():
            by_rank[rank][name] = values.astype(np.float32)
    return by_rank


def train(job: Job, weights: Arrays) -> tuple[np.ndarray, list[Arrays]]:
    """Losses [steps, ranks], and every rank's gradients in the first step."""
    world, ranks = job.world, job.world.num_ranks
    params = job.put(weights)
    state = job.start(params)
    losses, first = [], []
    for step, tokens in enumerate(batches(world)):
        loss, grads = job.gradients(params, world.put(tokens))
        own = local_arrays(world, {"loss": loss, **grads})
        everyone = of_all_ranks(world, f"step{step}", own)
        job.group.check()
        losses.append([float(of_rank["loss"][0]) for of_rank in everyone])
        if step == 0:
            first = [
                {name: array for name, array in of_rank.items() if name != "loss"} for of_rank in everyone
            ]
        mean = {
            name: world.put(
                np.stack([of_rank[name] / ranks for of_rank in everyone])
                if is_expert(name)
                else stack([sum(of_rank[name] for of_rank in everyone) / ranks] * ranks)
            )
            for name in params
        }
        params, state = job.update(params, mean, state)
    return np.array(losses), first


def compare(losses: np.ndarray, gradients: list[Arrays], reference: Any) -> str:
    want = reference["losses"]
    worst_loss = float(np.max(np.abs(losses - want) / want))
    assert worst_loss <= LOSS_TOLERANCE, f"losses differ by {worst_loss:.1e}:\n{losses}\n{want}"
    assert np.all(want[-1] < want[0]), f"expected losses that fall, got {want.mean(axis=1)}"
    worst, where = 0.0, ""
    for rank, of_rank in enumerate(gradients):
        for name, array in of_rank.items():
            expected = reference[f"gradient {rank} {name}"]
            largest = np.abs(expected).max()
            difference = (
                float(np.abs(array - expected).mean() / largest) if largest else float(np.abs(array).max())
            )
            if difference > worst:
                worst, where = difference, f"{name} of rank {rank}"
    assert worst <= GRADIENT_TOLERANCE, f"gradient of {where} differs by {worst:.1e} in the mean"
    shown = np.array2string(losses.mean(axis=1), precision=4)
    return f"losses {shown}, at most {worst_loss:.1e} from the other run's; gradients {worst:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=pathlib.Path, help="write weights, losses and gradients there")
    parser.add_argument("--reference", type=pathlib.Path, help="compare with what --save wrote")
    arguments = parser.parse_args()
    world = World()
    job = Job(world)
    with job.group:
        if arguments.reference is None:
            weights = job.initial()
            losses, gradients = train(job, weights)
            again, _ = train(job, weights)
            np.testing.assert_array_equal(losses, again, "the same steps give the same bits")
            if arguments.save is not None:
                named = {
                    f"gradient {rank} {name}": array
                    for rank, of_rank in enumerate(gradients)
                    for name, array in of_rank.items()
                }
                weights = {f"weight {name}": array for name, array in weights.items()}
                np.savez(arguments.save, losses=losses, **weights, **named)
            world.say(f"ok, losses {losses.mean(axis=1)}")
            return
        reference = np.load(arguments.reference)
        prefix = "weight "
        weights = {
            name.removeprefix(prefix): reference[name] for name in reference.files if name.startswith(prefix)
        }
        text = compare(*train(job, weights), reference)
        world.say(f"ok, {text}")


if __name__ == "__main__":
    main()
