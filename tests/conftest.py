"""Sixteen CPU devices for every test, whatever the machine has; GPU tests only on request."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

import jax_wideep as wep

NUM_DEVICES = 16
wep.use_cpu_devices(NUM_DEVICES)

# The same examples on every machine; no deadline, since the first example compiles.
hypothesis.settings.register_profile(
    "wideep",
    deadline=None,
    derandomize=True,
    max_examples=25,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("wideep")


def pytest_collection_modifyitems(config, items):
    if "gpu" in (config.getoption("markexpr") or ""):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run tests/gpu, or pytest -m gpu"))


@pytest.fixture(params=["cpu", "xla"])
def backend(request):
    return request.param


@pytest.fixture
def make_group():
    """Makes ExpertGroups over the first ranks of this process and closes them at the end of the test."""
    groups = []

    def make(num_ranks=8, *, num_experts=16, top_k=2, hidden=128, mesh=None, axis="expert", **settings):
        if mesh is None:
            mesh = jax.make_mesh(
                (num_ranks,),
                ("expert",),
                axis_types=(jax.sharding.AxisType.Auto,),
                devices=jax.devices()[:num_ranks],
            )
        groups.append(
            wep.ExpertGroup(mesh, axis=axis, num_experts=num_experts, top_k=top_k, hidden=hidden, **settings)
        )
        return groups[-1]

    yield make
    for group in groups:
        group.close()
