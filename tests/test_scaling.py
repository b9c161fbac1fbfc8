"""The scaling model's arithmetic against brute force: every choice of experts, and loops over drawn tokens."""

import importlib.util
import itertools
import pathlib
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


model = load("scaling_model")
scaling = load("scaling")


@pytest.mark.parametrize(
    ("num_experts", "top_k", "parts"), [(12, 3, 4), (12, 3, 2), (8, 2, 8), (6, 6, 3), (8, 3, 1)]
)
def test_distinct_parts_are_the_mean_over_all_choices(num_experts, top_k, parts):
    choices = list(itertools.combinations(range(num_experts), top_k))
    mean = np.mean([len({e * parts // num_experts for e in choice}) for choice in choices])
    assert model.expected_distinct(parts, num_experts, top_k) == pytest.approx(mean)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_spread_under_limited_groups_is_the_mean_over_all_choices(parts):
    """4 groups of 4 experts, 2 groups a token, 3 experts: parts that hold groups, are groups, lie in groups."""
    e = model.Exchange(8, 1, node_size=2, num_experts=16, top_k=3, num_groups=4, top_groups=2)
    counts = [
        len({expert * parts // 16 for expert in choice})
        for groups in itertools.combinations(range(4), 2)
        for choice in itertools.combinations([x for x in range(16) if x // 4 in groups], 3)
    ]
    assert model.expected_spread(e, parts) == pytest.approx(np.mean(counts))


def brute_links(e, topk_idx, *, two_hop):
    """Every row's path, one after the other."""
    counts = {
        name: np.zeros(e.ranks, int) for name in ("nvlink_out", "nvlink_in", "nic_out", "nic_in", "rows")
    }

    def move(link, source, target):
        if source != target:
            counts[f"{link}_out"][source] += 1
            counts[f"{link}_in"][target] += 1

    for source in range(e.ranks):
        for choice in topk_idx[source]:
            hosts = [int(expert) * e.ranks // e.num_experts for expert in choice]
            for host in hosts:
                counts["rows"][host] += 1
            for node in {host // e.node_size for host in hosts}:
                own = node == source // e.node_size
                forwarder = source if own else node * e.node_size + source % e.node_size
                if two_hop:
                    move("nic", source, forwarder)
                for host in {host for host in hosts if host // e.node_size == node}:
                    if two_hop:
                        move("nvlink", forwarder, host)
                    else:
                        move("nvlink" if own else "nic", source, host)
    return counts


@pytest.mark.parametrize("two_hop", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_counted_links_are_those_of_every_row(two_hop, groups):
    e = model.Exchange(
        12, 9, node_size=3, num_experts=24, top_k=4, num_groups=groups[0], top_groups=groups[1]
    )
    rng = np.random.default_rng(3)
    topk_idx = [model.draw_topk_idx(rng, e, zipf=0.7) for _ in range(e.ranks)]
    for choice in np.concatenate(topk_idx):
        assert len(set(choice)) == 4
        assert len({expert * groups[0] // 24 for expert in choice}) <= groups[1]
    got = model.count_links(e, lambda rank: topk_idx[rank], two_hop=two_hop)
    for name, want in brute_links(e, topk_idx, two_hop=two_hop).items():
        np.testing.assert_array_equal(getattr(got, name), want, err_msg=name)


@pytest.mark.parametrize("two_hop", [True, False])
def test_expected_links_are_the_mean_of_drawings(two_hop):
    e = model.Exchange(12, 2000, node_size=3, num_experts=24, top_k=4)
    rng = np.random.default_rng(5)
    drawn = model.count_links(e, lambda _: model.draw_topk_idx(rng, e), two_hop=two_hop)
    expected = model.expected_links(e, two_hop=two_hop)
    for name in ("nvlink_out", "nvlink_in", "nic_out", "nic_in", "rows"):
        # 24,000 tokens: a mean within half a percent.
        assert np.mean(getattr(drawn, name)) == pytest.approx(getattr(expected, name), rel=0.005)


def test_time_is_the_slowest_resource_and_a_fixed_part():
    e = model.Exchange(16, 100, num_experts=16, top_k=1, hidden=1024, fp8_dispatch=False, num_sms=2)
    machine = model.Machine(
        "test", nvlink=1e9, nic=1e8, hbm=1e12, per_sm=1e12, fixed_ll=1e-6, fixed_two_hop=2e-6
    )
    links = model.Links(nvlink_out=10, nvlink_in=30, nic_out=np.array([1, 2]), nic_in=0, rows=5)
    wire = 2048 + 32
    got = model.time_of(e, machine, links, two_hop=True, row_bytes=2048)
    assert (got.limit, got.seconds) == ("nvlink", pytest.approx(2e-6 + 30 * wire / 1e9))
    slow_nic = model.Links(nvlink_out=10, nvlink_in=30, nic_out=np.array([1, 4]), nic_in=0, rows=5)
    got = model.time_of(e, machine, slow_nic, two_hop=False, row_bytes=2048)
    assert (got.limit, got.seconds) == ("nic", pytest.approx(1e-6 + 4 * wire / 1e8))


def test_low_latency_calls_are_counted_by_chunks():
    one = scaling.exchange(64, 128)
    more = scaling.exchange(64, 129)
    links = model.expected_links(one, two_hop=False)
    difference = model.layer_seconds(more, model.H200, two_hop=False, links=links) - model.layer_seconds(
        one, model.H200, two_hop=False, links=links
    )
    assert difference == pytest.approx(2 * model.H200.fixed_ll)


def test_crossover_is_where_the_two_shapes_meet():
    e = scaling.exchange(64, 1)
    tokens = model.crossover_tokens(e, model.H200)

    def gain(tokens):
        at = scaling.exchange(64, tokens)
        return model.layer_seconds(at, model.H200, two_hop=False) - model.layer_seconds(
            at, model.H200, two_hop=True
        )

    assert gain(tokens) > 0 >= gain(tokens - 1)
    never = model.Machine("slow plan", nvlink=1e12, nic=1e12, fixed_two_hop=1.0)
    assert model.crossover_tokens(e, never, most=1000) is None


def test_arena_bytes_are_those_of_the_layout():
    """The same number stands in two_hop_test.cc, for the C++ layout."""
    e = model.Exchange(6, 1, node_size=3, num_experts=12, top_k=4, hidden=64)
    assert model.two_hop_arena_bytes(e, channels=2, across_slots=5, node_slots=3) == 42496


def test_the_model_is_within_a_seventh_of_published_figures_but_for_two_nodes():
    """All but two hops on 16 ranks, which docs/scaling.md names."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in scaling.check_table().splitlines()[2:]
    ]
    assert len(rows) == 18
    far = [row[:2] for row in rows if abs(int(row[5].rstrip("%"))) > 14]
    assert far == [["two hops", "16"], ["two hops", "16"]]


@pytest.mark.parametrize(
    ("changes", "message"), [(dict(num_experts=100), "ranks=64"), (dict(node_size=7), "node_size=7")]
)
def test_sizes_that_do_not_divide_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model.Exchange(64, 128, **changes)


def test_the_program_fills_a_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    names = ("published", "time", "memory", "crossover", "drawn")
    page.write_text("".join(f"<!-- table {name} -->\nold\n<!-- end -->\n" for name in names))
    plot = tmp_path / "plot.png"
    monkeypatch.setattr(
        sys,
        "argv",
        ["scaling.py", "--ranks", "16", "--draw-ranks", "16", "--page", str(page), "--out", str(plot)],
    )
    exchange = scaling.exchange
    monkeypatch.setattr(
        scaling, "exchange", lambda ranks, tokens, **kw: exchange(ranks, min(tokens, 64), **kw)
    )
    scaling.main()
    text = page.read_text()
    assert "old" not in text and text.count("| 16 |") >= 6
    assert plot.stat().st_size > 10_000
