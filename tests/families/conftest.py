"""Fixtures of the families' tests."""

import pytest
from checkpoints import PRESETS


@pytest.fixture(params=list(PRESETS))
def family(request):
    return request.param


@pytest.fixture
def family_group(make_group):
    """Makes the ExpertGroup that a preset needs."""

    def make(preset, num_ranks=4, **settings):
        router = preset.router
        settings = {
            "num_experts": router.num_experts,
            "top_k": router.top_k,
            "hidden": preset.hidden,
        } | settings
        return make_group(num_ranks, **settings)

    return make
