"""What the low-latency ops become on the backend "cuda", as far as that shows without a GPU."""

import re

import jax
import jax.numpy as jnp
import oracle
import pytest

import jax_wideep as wep


class Barriers:
    """The optimization barriers of a program: from what leaves one to what goes in."""

    def __init__(self, text):
        self._before = {}
        pattern = r"(%\w+)(?::(\d+))? = stablehlo.optimization_barrier ([^:]*) :"
        for result, number, operands in re.findall(pattern, text):
            names = [f"{result}#{i}" for i in range(int(number))] if number else [result]
            self._before |= dict(zip(names, operands.split(", "), strict=True))

    def before(self, name):
        """What has become `name` behind one or more of them."""
        assert name in self._before, f"{name} leaves no barrier"
        while name in self._before:
            name = self._before[name]
        return name

    def take(self, name):
        """Whether one takes it, or its results."""
        return any(taken.split("#")[0] == name for taken in self._before.values())


@pytest.fixture
def lowered(make_group):
    """Makes a function that gives the custom calls of `body` on every rank: (result, target, operands).

    All of them stand between barriers; without, XLA for GPUs would join them with slices and run some twice.
    """
    group = make_group(4, num_experts=8, top_k=2, hidden=256, chunk=6, backend="cpu")
    object.__setattr__(group, "backend", "cuda")

    def calls(body):
        shapes = [
            jax.ShapeDtypeStruct((4 * 5, *columns), dtype)
            for columns, dtype in (((256,), jnp.bfloat16), ((2,), jnp.float32), ((2,), jnp.int32))
        ]
        function = oracle.on_ranks(group, lambda *arrays: body(group, *arrays))
        text = function.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        barriers = Barriers(text)
        pattern = r"(%\w+)(?::\d+)? = stablehlo.custom_call @wideep_(\w+)\(([^)]*)\)"
        found = re.findall(pattern, text)
        assert all(barriers.take(result) for result, _, _ in found)
        return [
            (result, target, [barriers.before(operand) for operand in operands.split(", ")])
            for result, target, operands in found
        ]

    return calls


def whole(group, x, weights, topk_idx):
    recv = wep.ll_dispatch(x, topk_idx, group)
    return wep.ll_combine(recv.rows * 2, weights, recv)


def halves(group, x, weights, topk_idx):
    recv = wep.ll_dispatch_recv(wep.ll_dispatch_send(x, topk_idx, group))
    return wep.ll_combine_recv(wep.ll_combine_send(recv.rows * 2, weights, recv))


def test_a_whole_op_is_one_call(lowered):
    assert [(target, len(operands)) for _, target, operands in lowered(whole)] == [
        ("ll_dispatch", 3),
        ("ll_combine", 5),
    ]


def test_halves_are_calls_of_their_own_in_order(lowered):
    calls = lowered(halves)
    assert [target for _, target, _ in calls] == [
        "ll_dispatch_send",
        "ll_dispatch_recv",
        "ll_combine_send",
        "ll_combine_recv",
    ]
    for sending, receiving in (calls[:2], calls[2:]):
        assert receiving[2][0] == sending[0]  # the ticket


@pytest.mark.parametrize("forward", [whole, halves])
def test_gradients_are_those_of_the_whole_ops(lowered, forward):
    def body(group, x, weights, topk_idx):
        out, backward = jax.vjp(lambda x, weights: forward(group, x, weights, topk_idx), x, weights)
        return backward(out)

    backward_calls = [(target, len(operands)) for _, target, operands in lowered(body)][-2:]
    assert backward_calls == [("ll_combine_grad", 6), ("ll_combine", 5)]


def test_halves_refuse_vmap(lowered):
    def body(group, x, weights, topk_idx):
        stacked = jax.tree.map(lambda a: jnp.stack([a, a]), (x, weights, topk_idx))
        return jax.vmap(lambda *arrays: halves(group, *arrays))(*stacked)[0]

    with pytest.raises(ValueError, match="ll_dispatch_send: the halves cannot run under"):
        lowered(body)
