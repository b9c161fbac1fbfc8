"""Routers against NumPy references written as loops, and their losses against the papers' sums."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_wideep.routing import (
    RouterConfig,
    Routing,
    load_balance_loss,
    route,
    router_logits,
    update_selection_bias,
    z_loss,
)

E, K = 16, 4

# One of each kind of router; the comments name a model that routes so.
CONFIGS = {
    "softmax": RouterConfig(E, K),  # Mixtral, GPT-OSS
    "raw": RouterConfig(E, 1, renormalize=False),  # Switch
    "max_groups": RouterConfig(
        E, K, renormalize=False, num_groups=4, group_top_k=2, group_score="max", scaling_factor=16.0
    ),  # DeepSeek-V2
    "top2_groups": RouterConfig(
        E, K, score="sigmoid", num_groups=4, group_top_k=2, use_selection_bias=True, scaling_factor=2.5
    ),  # DeepSeek-V3
    "sigmoid_raw": RouterConfig(E, K, score="sigmoid", renormalize=False),
    "softmax_bias": RouterConfig(E, K, use_selection_bias=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


# References ------------------------------------------------------------------------------------------------


def reference_scores(logits, score):
    """Every expert's score, in float64."""
    logits = np.asarray(logits, np.float64)
    if score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def reference_choice(scores, config, bias):
    """Experts of each token: repeatedly the best one left, the first of equals."""
    biased = scores if bias is None else scores + np.asarray(bias, np.float32)
    size = config.num_experts // config.num_groups
    chosen = []
    for token in biased:
        group_scores = []
        for group in range(config.num_groups):
            ordered = sorted(token[group * size : (group + 1) * size], reverse=True)
            group_scores.append(ordered[0] if config.group_score == "max" else np.float32(sum(ordered[:2])))
        kept = sorted(range(config.num_groups), key=lambda group: (-group_scores[group], group))
        kept = kept[: config.group_top_k]
        candidates = [expert for expert in range(config.num_experts) if expert // size in kept]
        candidates.sort(key=lambda expert: (-token[expert], expert))
        chosen.append(candidates[: config.top_k])
    return np.array(chosen, np.int32).reshape(len(scores), config.top_k)


def reference_weights(logits, topk_idx, config):
    """Gate weights of the chosen experts, in float64."""
    scores = reference_scores(logits, config.score)
    weights = np.zeros(topk_idx.shape)
    for token, experts in enumerate(topk_idx):
        gates = [scores[token, expert] for expert in experts]
        total = sum(gates) if config.renormalize else 1.0
        weights[token] = [config.scaling_factor * gate / total for gate in gates]
    return weights


def reference_load_balance(scores, topk_idx, num_experts, mask):
    """Switch's loss, one token and one selection at a time, in float64."""
    selections, shares, tokens = np.zeros(num_experts), np.zeros(num_experts), 0
    for token in range(len(scores)):
        if mask[token]:
            tokens += 1
            shares += np.float64(scores[token]) / np.float64(scores[token]).sum()
            for expert in topk_idx[token]:
                selections[expert] += 1
    return num_experts * (selections / max(selections.sum(), 1) * shares / max(tokens, 1)).sum()


def random_logits(seed, tokens=32, experts=E, scale=2.0):
    return (scale * np.random.default_rng(seed).standard_normal((tokens, experts))).astype(np.float32)


def bias_for(config, seed=7):
    if not config.use_selection_bias:
        return None
    return jnp.asarray(0.3 * np.random.default_rng(seed).standard_normal(config.num_experts), jnp.float32)


def central_difference(function, at, step=1e-6):
    """Gradient of a float64 NumPy function."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        offset = np.zeros_like(at)
        offset[index] = step
        gradient[index] = (function(at + offset) - function(at - offset)) / (2 * step)
    return gradient


# route -----------------------------------------------------------------------------------------------------


@st.composite
def routers(draw):
    """A config, with logits that tie often, a bias and a mask that go with it."""
    num_groups, group_size = draw(st.sampled_from([(1, 8), (2, 3), (4, 2), (4, 1)]))
    group_score = draw(st.sampled_from(["max"] if group_size == 1 else ["max", "top2"]))
    group_top_k = draw(st.integers(1, num_groups))
    config = RouterConfig(
        num_experts=num_groups * group_size,
        top_k=draw(st.integers(1, group_top_k * group_size)),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw(st.booleans()),
        num_groups=num_groups,
        group_top_k=group_top_k,
        group_score=group_score,
        use_selection_bias=draw(st.booleans()),
        scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )
    tokens = draw(st.sampled_from([0, 1, 17]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = 3 * rng.standard_normal((tokens, config.num_experts))
    if draw(st.booleans()):
        logits = np.round(logits)  # many ties
    bias = rng.choice([-0.5, 0.0, 0.25], config.num_experts) if config.use_selection_bias else None
    mask = rng.random(tokens) < 0.7 if draw(st.booleans()) else None
    dtype = draw(st.sampled_from([jnp.bfloat16, jnp.float16, jnp.float32]))
    return config, jnp.asarray(logits, dtype), bias, mask


@given(routers())
@settings(max_examples=60, deadline=None)
def test_route_equals_reference(router):
    config, logits, bias, mask = router
    got = route(
        logits,
        config,
        selection_bias=None if bias is None else jnp.asarray(bias, jnp.float32),
        token_mask=None if mask is None else jnp.asarray(mask),
    )
    assert isinstance(got, Routing)
    assert got.topk_idx.dtype == jnp.int32
    assert got.topk_weights.dtype == got.scores.dtype == jnp.float32
    assert got.topk_idx.shape == got.topk_weights.shape == (len(logits), config.top_k)

    real = np.ones(len(logits), bool) if mask is None else mask
    wide = np.asarray(logits.astype(jnp.float32))
    scores = np.asarray(got.scores)
    np.testing.assert_allclose(scores[real], reference_scores(wide, config.score)[real], rtol=1e-5, atol=1e-7)
    # The choice is checked on the float32 scores themselves, so that ties are ties in the reference too.
    expected_idx = reference_choice(scores, config, bias)
    expected_weights = reference_weights(wide, expected_idx, config)
    np.testing.assert_array_equal(got.topk_idx, np.where(real[:, None], expected_idx, -1))
    np.testing.assert_allclose(
        got.topk_weights, np.where(real[:, None], expected_weights, 0), rtol=2e-5, atol=1e-7
    )


@each_config
def test_route_under_jit_is_route(config):
    logits, bias = jnp.asarray(random_logits(1)), bias_for(config)
    eager = route(logits, config, selection_bias=bias)
    jitted = jax.jit(functools.partial(route, config=config))(logits, selection_bias=bias)
    np.testing.assert_array_equal(eager.topk_idx, jitted.topk_idx)
    np.testing.assert_allclose(eager.topk_weights, jitted.topk_weights, rtol=1e-6)


def test_config_is_a_static_argument():
    routed = jax.jit(route, static_argnums=1)(jnp.asarray(random_logits(1)), CONFIGS["softmax"])
    assert routed.topk_idx.shape == (32, K)


@each_config
def test_ties_go_to_the_lowest_expert(config):
    bias = jnp.zeros(E) if config.use_selection_bias else None
    got = route(jnp.zeros((3, E)), config, selection_bias=bias)
    np.testing.assert_array_equal(got.topk_idx, np.tile(np.arange(config.top_k), (3, 1)))


def test_renormalised_softmax_is_softmax_over_the_chosen():
    logits = random_logits(2)
    got = route(jnp.asarray(logits), CONFIGS["softmax"])
    best = -np.sort(-logits, axis=1)[:, :K]
    np.testing.assert_array_equal(got.topk_idx, np.argsort(-logits, axis=1)[:, :K])
    np.testing.assert_allclose(got.topk_weights, reference_scores(best, "softmax"), rtol=1e-5)


@each_config
def test_weights_sum_to_the_scaling_factor_when_renormalised(config):
    config = dataclasses.replace(config, renormalize=True)
    # -80 and below: sigmoids whose float32 sum underflows have weights too.
    for shift in (0.0, -80.0, -200.0):
        got = route(jnp.asarray(random_logits(3) + shift), config, selection_bias=bias_for(config))
        np.testing.assert_allclose(np.sum(got.topk_weights, axis=1), config.scaling_factor, rtol=1e-5)


def test_groups_bound_where_a_token_may_go():
    config = CONFIGS["top2_groups"]
    got = route(jnp.asarray(random_logits(4)), config, selection_bias=bias_for(config))
    groups = np.asarray(got.topk_idx) // config.group_size
    assert max(len(set(row)) for row in groups) == config.group_top_k


def test_group_score_decides_between_one_peak_and_two_good_experts():
    logits = jnp.full((1, 6), -4.0).at[0, 0].set(3.0).at[0, jnp.array([4, 5])].set(2.0)
    config = RouterConfig(6, 2, score="sigmoid", num_groups=2, group_top_k=1)
    np.testing.assert_array_equal(route(logits, config).topk_idx, [[4, 5]])
    config = dataclasses.replace(config, group_score="max")
    np.testing.assert_array_equal(route(logits, config).topk_idx, [[0, 1]])


def test_negative_bias_does_not_let_excluded_groups_in():
    """Excluded experts rank below all others, those of a kept group with a negative bias included."""
    config = RouterConfig(
        4, 2, score="sigmoid", num_groups=2, group_top_k=1, group_score="max", use_selection_bias=True
    )
    got = route(jnp.array([[3.0, 0.0, 0.0, 0.0]]), config, selection_bias=jnp.array([0.0, -9.0, 0.0, 0.0]))
    np.testing.assert_array_equal(got.topk_idx, [[0, 1]])


def test_bias_moves_the_choice_and_not_the_weights():
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    config = RouterConfig(4, 2, score="sigmoid", renormalize=False, use_selection_bias=True)
    got = route(logits, config, selection_bias=jnp.array([-5.0, 0.0, 0.0, 5.0]))
    np.testing.assert_array_equal(got.topk_idx, [[3, 1]])
    expected = reference_scores(logits, "sigmoid")
    np.testing.assert_allclose(got.topk_weights, expected[:, [3, 1]], rtol=1e-6)
    np.testing.assert_allclose(got.scores, expected, rtol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_of_minus_infinity_takes_experts_out(score):
    """A failed rank's experts are never chosen; the others' weights are sound, however small their scores."""
    config = RouterConfig(E, K, score=score, use_selection_bias=True)
    logits = jnp.asarray(random_logits(5)).at[:, :K].add(200.0)
    bias = jnp.zeros(E).at[:K].set(-jnp.inf)

    def weights(logits):
        return route(logits, config, selection_bias=bias).topk_weights

    assert np.asarray(route(logits, config, selection_bias=bias).topk_idx).min() >= K
    np.testing.assert_allclose(np.sum(weights(logits), axis=1), 1.0, rtol=1e-5)
    assert np.isfinite(jax.jacobian(weights)(logits)).all()


# Numbers that are not finite -------------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["one", "some", "all"])
def test_indices_are_valid_and_distinct_whatever_the_logits(config, value, where):
    logits = random_logits(6)
    columns = {"one": [5], "some": [0, 3, 8, 9, 10, 11, 12], "all": slice(None)}[where]
    logits[:, columns] = value
    got = route(jnp.asarray(logits), config, selection_bias=bias_for(config))
    idx = np.asarray(got.topk_idx)
    assert ((idx >= 0) & (idx < E)).all()
    assert all(len(set(row)) == config.top_k for row in idx)
    if where == "one" and value == -np.inf:
        assert np.isfinite(got.topk_weights).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])  # a sort by bits puts one NaN first and the other last
def test_nan_shows_in_the_weights(sign):
    logits = random_logits(6)
    logits[:, E - 1] = np.copysign(np.nan, sign)
    assert np.isnan(route(jnp.asarray(logits), CONFIGS["softmax"]).topk_weights).all()
    got = route(jnp.asarray(logits), CONFIGS["sigmoid_raw"])  # the others have scores: NaN is not chosen
    assert (np.asarray(got.topk_idx) != E - 1).all()
    assert np.isfinite(got.topk_weights).all()
    everyone = dataclasses.replace(CONFIGS["sigmoid_raw"], top_k=E)
    got = route(jnp.asarray(logits), everyone)
    assert (np.asarray(got.topk_idx)[:, -1] == E - 1).all()
    assert np.isnan(np.asarray(got.topk_weights)[:, -1]).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_logits_of_minus_infinity_have_weight_zero_and_finite_gradients(score):
    config = RouterConfig(4, 3, score=score)
    logits = jnp.array([[1.0, -jnp.inf, 2.0, -jnp.inf]])
    got = route(logits, config)
    np.testing.assert_array_equal(got.topk_idx, [[2, 0, 1]])
    assert got.topk_weights[0, 2] == 0
    np.testing.assert_allclose(np.sum(got.topk_weights), 1, rtol=1e-6)
    assert np.isfinite(jax.jacobian(lambda logits: route(logits, config).topk_weights)(logits)).all()


def test_sigmoids_that_all_vanish_share_equally():
    got = route(jnp.full((2, E), -jnp.inf), RouterConfig(E, K, score="sigmoid"))
    np.testing.assert_allclose(got.topk_weights, 1 / K)


@each_config
def test_masked_tokens_draw_nothing_and_get_no_gradient(config):
    logits = random_logits(8)
    mask = np.arange(len(logits)) % 3 != 0
    logits[~mask] = np.nan  # padding may hold anything
    cotangent = jnp.asarray(random_logits(9, experts=config.top_k))

    def objective(logits):
        got = route(logits, config, selection_bias=bias_for(config), token_mask=jnp.asarray(mask))
        balance = load_balance_loss(got.scores, got.topk_idx, E)
        penalty = z_loss(logits, token_mask=jnp.asarray(mask))
        return jnp.sum(got.topk_weights * cotangent) + balance + penalty, got

    (value, got), gradient = jax.value_and_grad(objective, has_aux=True)(jnp.asarray(logits))
    assert (np.asarray(got.topk_idx)[~mask] == -1).all()
    assert (np.asarray(got.topk_weights)[~mask] == 0).all()
    assert (np.asarray(got.topk_idx)[mask] >= 0).all()
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~mask] == 0).all()
    assert np.abs(np.asarray(gradient)[mask]).max() > 0


@pytest.mark.parametrize("loss", ["load_balance_loss", "z_loss"])
def test_losses_of_masked_tokens_may_be_anything(loss):
    mask, topk_idx = jnp.array([True, False, True]), jnp.array([[0], [1], [2]])
    clean = jnp.exp(jnp.asarray(random_logits(27, tokens=3)))
    function = {
        "load_balance_loss": lambda scores: load_balance_loss(scores, topk_idx, E, token_mask=mask),
        "z_loss": lambda logits: z_loss(logits, token_mask=mask),
    }[loss]
    expected, expected_gradient = jax.value_and_grad(function)(clean)
    value, gradient = jax.value_and_grad(function)(clean.at[1].set(jnp.nan))
    assert (np.asarray(gradient)[1] == 0).all()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6)


def test_no_tokens():
    for config in CONFIGS.values():
        got = route(jnp.zeros((0, E)), config, selection_bias=bias_for(config))
        assert got.topk_idx.shape == got.topk_weights.shape == (0, config.top_k)
        assert load_balance_loss(got.scores, got.topk_idx, E) == 0
    assert z_loss(jnp.zeros((0, E))) == 0


# Gradients -------------------------------------------------------------------------------------------------


@each_config
def test_weight_gradients_equal_finite_differences(config):
    logits = random_logits(10, tokens=5, scale=1.0)
    cotangent = random_logits(11, tokens=5, experts=config.top_k)
    bias = bias_for(config)
    topk_idx = np.asarray(route(jnp.asarray(logits), config, selection_bias=bias).topk_idx)

    def objective(logits):
        return jnp.sum(route(logits, config, selection_bias=bias).topk_weights * cotangent)

    def reference(logits):  # the choice held fixed: it has no derivative
        return (reference_weights(logits, topk_idx, config) * cotangent).sum()

    expected = central_difference(reference, logits.astype(np.float64))
    np.testing.assert_allclose(jax.grad(objective)(jnp.asarray(logits)), expected, rtol=1e-4, atol=1e-5)


def test_switch_weight_is_the_probability_with_its_derivative():
    """d p_i / d z_j = p_i (1[i = j] - p_j), equation 2 of arXiv:2101.03961."""
    logits = random_logits(12, tokens=1)
    got = jax.jacobian(lambda logits: route(logits, CONFIGS["raw"]).topk_weights[0, 0])(jnp.asarray(logits))
    (p,) = reference_scores(logits, "softmax")
    winner = logits[0].argmax()
    np.testing.assert_allclose(got[0], p[winner] * ((np.arange(E) == winner) - p), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["top2_groups", "softmax_bias"])
def test_bias_gets_no_gradient(name):
    config, logits = CONFIGS[name], jnp.asarray(random_logits(13))

    def objective(bias):
        got = route(logits, config, selection_bias=bias)
        balance = load_balance_loss(got.scores, got.topk_idx, E)
        return jnp.sum(got.topk_weights**2) + jnp.sum(got.scores**2) + balance

    np.testing.assert_array_equal(jax.grad(objective)(bias_for(config)), np.zeros(E))


# router_logits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kernel_dtype", [jnp.float32, jnp.bfloat16])
def test_router_logits_are_float32_products(x_dtype, kernel_dtype):
    x = jnp.asarray(random_logits(14, experts=256), x_dtype)
    kernel = jnp.asarray(random_logits(15, tokens=256), kernel_dtype)
    got = router_logits(x, kernel, CONFIGS["softmax"])
    assert got.dtype == jnp.float32
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(
        kernel.astype(jnp.float32), np.float64
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-3)


def test_jitter_scales_each_input_by_its_own_factor_near_one():
    config = dataclasses.replace(CONFIGS["softmax"], jitter=0.1)
    x = jnp.ones((512, E), jnp.bfloat16)  # with the identity for a kernel the logits are the noise
    rng = jax.random.key(0)
    noise = np.asarray(router_logits(x, jnp.eye(E), config, jitter_rng=rng))
    assert 0.9 <= noise.min() < 0.901 and 1.099 < noise.max() <= 1.1
    assert abs(noise.mean() - 1) < 0.005
    assert len(np.unique(noise)) > 0.9 * noise.size  # not rounded to bfloat16, nor shared
    np.testing.assert_array_equal(noise, router_logits(x, jnp.eye(E), config, jitter_rng=rng))
    other = router_logits(x, jnp.eye(E), config, jitter_rng=jax.random.key(1))
    assert not np.array_equal(noise, other)


def test_jitter_needs_both_a_key_and_an_amplitude():
    x, kernel = jnp.asarray(random_logits(16, experts=8)), jnp.asarray(random_logits(17, tokens=8))
    plain = router_logits(x, kernel, CONFIGS["softmax"])
    noisy_config = dataclasses.replace(CONFIGS["softmax"], jitter=0.1)
    np.testing.assert_array_equal(plain, router_logits(x, kernel, noisy_config))
    keyed = router_logits(x, kernel, CONFIGS["softmax"], jitter_rng=jax.random.key(0))
    np.testing.assert_array_equal(plain, keyed)


def test_router_logits_gradients():
    x, kernel = jnp.asarray(random_logits(18, experts=8)), jnp.asarray(random_logits(19, tokens=8))
    cotangent = jnp.asarray(random_logits(20))
    dx, dkernel = jax.grad(
        lambda x, kernel: jnp.sum(router_logits(x, kernel, CONFIGS["softmax"]) * cotangent), argnums=(0, 1)
    )(x, kernel)
    np.testing.assert_allclose(dx, np.asarray(cotangent) @ np.asarray(kernel).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dkernel, np.asarray(x).T @ np.asarray(cotangent), rtol=1e-4, atol=1e-4)


# Selection bias --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_update_raises_the_idle_and_lowers_the_busy(dtype):
    bias = jnp.array([0.5, -0.5, 0.0, 1.0])
    got = update_selection_bias(bias, jnp.array([0, 9, 4, 3], dtype), rate=0.25)  # mean 4
    np.testing.assert_array_equal(got, [0.75, -0.75, 0.0, 1.25])
    got = update_selection_bias(bias, jnp.array([0, 9, 4, 3], dtype))
    np.testing.assert_allclose(got - bias, [1e-3, -1e-3, 0, 1e-3], atol=1e-7)
    assert update_selection_bias(bias.astype(jnp.bfloat16), jnp.arange(4)).dtype == jnp.bfloat16


def test_repeated_updates_even_out_the_load():
    config = RouterConfig(E, 2, score="sigmoid", use_selection_bias=True)
    logits = jnp.asarray(random_logits(21, tokens=1024, scale=0.5) + np.linspace(-1, 1, E, dtype=np.float32))

    @jax.jit
    def step(bias, _):
        topk_idx = route(logits, config, selection_bias=bias).topk_idx
        load = jnp.bincount(topk_idx.ravel(), length=E)
        return update_selection_bias(bias, load, rate=0.01), jnp.max(load) / jnp.mean(load)

    _, imbalance = jax.lax.scan(step, jnp.zeros(E), length=100)
    assert imbalance[0] > 3
    assert imbalance[-1] < 1.3


# Losses ----------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["softmax", "sigmoid"]),
    st.sampled_from(["none", "idx", "arg"]),
)
@settings(max_examples=30, deadline=None)
def test_load_balance_loss_equals_reference(seed, score, masking):
    rng = np.random.default_rng(seed)
    experts, top_k = [(2, 1), (5, 5), (12, 3)][rng.integers(3)]
    config = RouterConfig(experts, top_k, score=score)
    mask = rng.random(13) < 0.6 if masking != "none" else np.ones(13, bool)
    logits = jnp.asarray(random_logits(seed, tokens=13, experts=experts))
    got = route(logits, config, token_mask=jnp.asarray(mask) if masking == "idx" else None)
    loss = load_balance_loss(
        got.scores, got.topk_idx, experts, token_mask=jnp.asarray(mask) if masking == "arg" else None
    )
    expected = reference_load_balance(np.asarray(got.scores), np.asarray(got.topk_idx), experts, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assume(mask.any())
    expected_z = np.mean(np.log(np.exp(np.float64(logits)).sum(axis=1))[mask] ** 2)
    np.testing.assert_allclose(z_loss(logits, token_mask=jnp.asarray(mask)), expected_z, rtol=1e-5)


@pytest.mark.parametrize("score", [0.01, 1 / E, 1.0])
def test_load_balance_loss_is_one_when_uniform_and_num_experts_when_collapsed(score):
    uniform_idx = jnp.arange(8 * K, dtype=jnp.int32).reshape(8, K) % E
    np.testing.assert_allclose(load_balance_loss(jnp.full((8, E), score), uniform_idx, E), 1.0, rtol=1e-6)
    collapsed = jnp.zeros((8, E)).at[:, 3].set(score)
    np.testing.assert_allclose(load_balance_loss(collapsed, jnp.full((8, 1), 3, jnp.int32), E), E, rtol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_load_balance_gradient_flows_through_the_scores_alone(score):
    logits = random_logits(22, tokens=6, scale=1.0)
    config = RouterConfig(E, 2, score=score)
    topk_idx = np.asarray(route(jnp.asarray(logits), config).topk_idx)

    def objective(logits):
        got = route(logits, config)
        return load_balance_loss(got.scores, got.topk_idx, E)

    def reference(logits):
        return reference_load_balance(reference_scores(logits, score), topk_idx, E, np.ones(6, bool))

    expected = central_difference(reference, logits.astype(np.float64))
    np.testing.assert_allclose(jax.grad(objective)(jnp.asarray(logits)), expected, rtol=1e-4, atol=1e-6)


def test_load_balance_loss_survives_scores_of_zero():
    topk_idx = jnp.zeros((2, 1), jnp.int32)
    for tiny in (0.0, 1e-25, 1e-18):
        value, gradient = jax.value_and_grad(load_balance_loss)(jnp.full((2, E), tiny), topk_idx, E)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_z_loss_of_uniform_logits_and_its_gradient():
    np.testing.assert_allclose(z_loss(jnp.zeros((4, E), jnp.bfloat16)), np.log(E) ** 2, rtol=1e-6)
    logits = random_logits(23, tokens=6)
    log_z = np.log(np.exp(np.float64(logits)).sum(axis=1, keepdims=True))
    expected = 2 * log_z * reference_scores(logits, "softmax") / 6
    np.testing.assert_allclose(jax.grad(z_loss)(jnp.asarray(logits)), expected, rtol=1e-5)


# shard_map -------------------------------------------------------------------------------------------------


def expert_mesh(shape=(8,), names=("expert",)):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh(shape, names)


MESHES = {"one_axis": ((8,), ("expert",)), "two_axes": ((2, 4), ("data", "expert"))}


@pytest.mark.parametrize(
    ("mesh_name", "masked", "config"),
    [
        ("two_axes", True, CONFIGS["max_groups"]),
        ("two_axes", True, CONFIGS["top2_groups"]),
        ("one_axis", True, CONFIGS["softmax"]),
        ("one_axis", False, CONFIGS["top2_groups"]),
    ],
)
def test_shard_map_equals_one_device(mesh_name, masked, config):
    mesh = expert_mesh(*MESHES[mesh_name])
    axes = mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]
    logits = jnp.asarray(random_logits(24, tokens=40))
    # The ranks' numbers of real tokens differ, and the second has none: a mean of means would be wrong.
    mask = (np.arange(40) % 7 < 4) & (np.arange(40) // 5 != 1) if masked else np.ones(40, bool)
    bias = bias_for(config)

    def forward(logits, mask, axis_name):
        got = route(logits, config, selection_bias=bias, token_mask=mask if masked else None)
        loss_mask = mask if masked else None
        balance = load_balance_loss(got.scores, got.topk_idx, E, axis_name=axis_name, token_mask=loss_mask)
        return balance + 0.1 * z_loss(logits, axis_name=axis_name, token_mask=loss_mask), got

    def sharded(logits, mask):
        value_and_grad = jax.value_and_grad(functools.partial(forward, axis_name=axes), has_aux=True)
        (loss, got), gradient = value_and_grad(logits, mask)
        return loss, got, gradient

    rows = P(axes)
    run = jax.jit(
        jax.shard_map(sharded, mesh=mesh, in_specs=(rows, rows), out_specs=(P(), rows, rows), check_vma=True)
    )
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, rows))
    loss, got, gradient = run(put(logits), put(jnp.asarray(mask)))

    single = jax.value_and_grad(functools.partial(forward, axis_name=None), has_aux=True)
    (expected_loss, expected), expected_gradient = single(logits, jnp.asarray(mask))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_array_equal(got.topk_idx, expected.topk_idx)
    np.testing.assert_allclose(got.topk_weights, expected.topk_weights, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_gradient_through_shard_map_equals_one_device():
    mesh = expert_mesh()
    logits, config = jnp.asarray(random_logits(25, tokens=40)), CONFIGS["top2_groups"]

    def loss(logits, axis_name=None):
        got = route(logits, config, selection_bias=bias_for(config))
        balance = load_balance_loss(got.scores, got.topk_idx, E, axis_name=axis_name)
        return balance + z_loss(logits, axis_name=axis_name)

    sharded = jax.shard_map(
        functools.partial(loss, axis_name="expert"),
        mesh=mesh,
        in_specs=P("expert"),
        out_specs=P(),
        check_vma=True,
    )
    placed = jax.device_put(logits, NamedSharding(mesh, P("expert")))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(sharded))(placed)
    np.testing.assert_allclose(gradient, jax.grad(loss)(logits), rtol=1e-4, atol=1e-7)


def test_route_of_sharded_logits_outside_shard_map():
    """Under `jit` with a sharded global array, as a layer may call it: sharding is carried along."""
    mesh = expert_mesh()
    logits = jnp.asarray(random_logits(26, tokens=40))
    placed = jax.device_put(logits, NamedSharding(mesh, P("expert")))
    for config in (CONFIGS["raw"], CONFIGS["top2_groups"]):
        bias = bias_for(config)
        with jax.set_mesh(mesh):
            got = jax.jit(functools.partial(route, config=config))(placed, selection_bias=bias)
        np.testing.assert_array_equal(got.topk_idx, route(logits, config, selection_bias=bias).topk_idx)
        assert got.topk_idx.sharding.is_equivalent_to(placed.sharding, 2)


# Errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_experts=0), r"num_experts must be a positive int, got 0; use 1 or more"),
        (dict(num_experts=8.0), r"num_experts must be a positive int, got 8\.0"),
        (dict(top_k=True), r"top_k must be a positive int, got True"),
        (dict(num_groups=-1), r"num_groups must be a positive int, got -1"),
        (dict(group_top_k=0), r"group_top_k must be a positive int, got 0"),
        (dict(score="relu"), r"score must be one of \('softmax', 'sigmoid'\), got 'relu'; use one of them"),
        (dict(group_score="sum"), r"group_score must be one of \('top2', 'max'\), got 'sum'"),
        (dict(top_k=9), r"top_k must be at most num_experts = 8, got 9; lower top_k"),
        (dict(num_groups=3), r"num_groups must divide num_experts = 8, got 3; use a divisor"),
        (
            dict(num_groups=2, group_top_k=3),
            r"group_top_k must be at most num_groups = 2, got 3; lower group",
        ),
        (
            dict(num_groups=4, top_k=3),
            r"top_k must be at most .* = 1 \* 2 experts .* got 3; raise",
        ),
        (
            dict(num_groups=8, group_top_k=2),
            r'"top2" needs groups of at least 2 .* got groups of 1 .*"max"',
        ),
        (dict(scaling_factor=0.0), r"scaling_factor must be finite and positive, got 0\.0; use 1\.0"),
        (dict(scaling_factor=float("nan")), r"scaling_factor must be finite and positive, got nan"),
        (dict(jitter=1.0), r"jitter must be in \[0, 1\), got 1\.0; use 0\.0"),
        (dict(jitter=-0.1), r"jitter must be in \[0, 1\), got -0\.1"),
        (dict(jitter=float("nan")), r"jitter must be in \[0, 1\), got nan"),
    ],
)
def test_config_errors(settings, message):
    with pytest.raises(ValueError, match=f"RouterConfig: .*{message}"):
        RouterConfig(**{"num_experts": 8, "top_k": 2, **settings})


PLAIN, BIASED = CONFIGS["softmax"], CONFIGS["softmax_bias"]
LOGITS, IDX = jnp.zeros((3, E)), jnp.zeros((3, 2), jnp.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(jnp.zeros((2, 3, E)), PLAIN), r"route: logits .* got float32\[2, 3, 16\]; flatten"),
        (lambda: route(jnp.zeros((3, 8)), PLAIN), r"route: logits .* = \[tokens, 16\], got float32\[3, 8\]"),
        (lambda: route(LOGITS.astype(int), PLAIN), r"route: logits must be a float array .* got int32"),
        (
            lambda: route(LOGITS, BIASED),
            r"selection_bias must be an array with use_selection_bias=True, got None",
        ),
        (
            lambda: route(LOGITS, PLAIN, selection_bias=jnp.zeros(E)),
            r"selection_bias must be None with use_selection_bias=False, got an array; pass both or neither",
        ),
        (
            lambda: route(LOGITS, BIASED, selection_bias=jnp.zeros((3, E))),
            r"route: selection_bias must be a float array .* = \[16\], got float32\[3, 16\]; it is one bias",
        ),
        (
            lambda: route(LOGITS, BIASED, selection_bias=jnp.zeros(E, int)),
            r"route: selection_bias must be a float array .* got int32\[16\]",
        ),
        (
            lambda: route(LOGITS, PLAIN, token_mask=jnp.ones(4, bool)),
            r"route: token_mask must be a bool array \[tokens\] = \[3\], got bool\[4\]; True marks",
        ),
        (
            lambda: route(LOGITS, PLAIN, token_mask=jnp.ones(3, int)),
            r"route: token_mask must be a bool array .* got int32\[3\]",
        ),
        (
            lambda: router_logits(jnp.zeros((2, 3, 5)), jnp.zeros((5, E)), PLAIN),
            r"router_logits: x .* got float32\[2, 3, 5\]; flatten",
        ),
        (
            lambda: router_logits(jnp.zeros((3, 5), int), jnp.zeros((5, E)), PLAIN),
            r"router_logits: x must be a float array .* got int32\[3, 5\]",
        ),
        (
            lambda: router_logits(jnp.zeros((3, 5)), jnp.zeros((E, 5)), PLAIN),
            r"router_logits: kernel .* = \[5, 16\], got float32\[16, 5\]; check its orientation",
        ),
        (
            lambda: router_logits(jnp.zeros((3, 5)), jnp.zeros((5, E), int), PLAIN),
            r"router_logits: kernel must be a float array .* got int32\[5, 16\]",
        ),
        (
            lambda: update_selection_bias(jnp.zeros((2, E)), jnp.zeros(E)),
            r"update_selection_bias: bias must be a float array \[experts\], got float32\[2, 16\]; it is",
        ),
        (
            lambda: update_selection_bias(jnp.zeros(E, int), jnp.zeros(E)),
            r"update_selection_bias: bias must be a float array .* got int32\[16\]",
        ),
        (
            lambda: update_selection_bias(jnp.zeros(E), jnp.zeros(2)),
            r"update_selection_bias: tokens_per_expert must be .* = \[16\] as bias is, got float32\[2\]",
        ),
        (
            lambda: load_balance_loss(LOGITS, IDX, 8),
            r"load_balance_loss: scores .* = \[tokens, 8\], got float32\[3, 16\]; pass Routing\.scores",
        ),
        (
            lambda: load_balance_loss(LOGITS.astype(int), IDX, E),
            r"load_balance_loss: scores must be a float array .* got int32\[3, 16\]",
        ),
        (
            lambda: load_balance_loss(LOGITS[0], IDX, E),
            r"load_balance_loss: scores .* got float32\[16\]",
        ),
        (
            lambda: load_balance_loss(LOGITS, IDX[:2], E),
            r"load_balance_loss: topk_idx must be an integer array .* = \[3, k\], got int32\[2, 2\]; pass",
        ),
        (
            lambda: load_balance_loss(LOGITS, IDX[:, 0], E),
            r"load_balance_loss: topk_idx .* got int32\[3\]",
        ),
        (
            lambda: load_balance_loss(LOGITS, IDX.astype(jnp.float32), E),
            r"load_balance_loss: topk_idx must be an integer array .* got float32\[3, 2\]",
        ),
        (
            lambda: load_balance_loss(LOGITS, IDX, E, token_mask=jnp.ones(2, bool)),
            r"load_balance_loss: token_mask must be a bool array \[tokens\] = \[3\], got bool\[2\]",
        ),
        (lambda: z_loss(jnp.zeros(E)), r"z_loss: logits must be a float array .* got float32\[16\]; flatten"),
        (lambda: z_loss(LOGITS.astype(int)), r"z_loss: logits must be a float array .* got int32\[3, 16\]"),
        (
            lambda: z_loss(LOGITS, token_mask=jnp.ones((3, 1), bool)),
            r"z_loss: token_mask must be a bool array \[tokens\] = \[3\], got bool\[3, 1\]",
        ),
    ],
)
def test_argument_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
