"""What Python decides for NVSHMEM: versions, nodes, mirrors, errors. Nothing here needs a GPU or the library."""

import ctypes
import importlib.metadata
import re
import types

import jax
import numpy as np
import pytest

import jax_wideep as wep
from jax_wideep import _ffi, _nvshmem


@pytest.mark.parametrize(
    ("text", "numbers"), [("3.4.5", (3, 4, 5)), ("3.10", (3, 10)), ("3.4.5.post1", (3, 4, 5))]
)
def test_versions_compare_by_numbers(text, numbers):
    assert _nvshmem.parse_version(text) == numbers


@pytest.fixture
def installed(monkeypatch):
    """Sets what looks installed: version, library, module."""

    def set_installed(version="3.4.5", library=True, module=True):
        def version_of(package):
            assert package == "nvidia-nvshmem-cu13"
            if version is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return version

        def load(name, mode=0):
            if not library:
                raise OSError(f"{name}: cannot open shared object file")
            return object()

        monkeypatch.setattr(importlib.metadata, "version", version_of)
        monkeypatch.setattr(ctypes, "CDLL", load)
        _nvshmem._load_library.cache_clear()
        monkeypatch.setattr(_ffi, "nvshmem_module", lambda: types.ModuleType("fake") if module else None)

    yield set_installed
    _nvshmem._load_library.cache_clear()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (dict(version="3.4.4"), r"NVSHMEM 3\.4\.5 or newer is needed, got 3\.4\.4; pip install"),
        (
            dict(version=None, library=False),
            r"libnvshmem_host\.so\.3 cannot be loaded .*; pip install nvidia-nvshmem",
        ),
        (dict(module=False), r"module _wideep_nvshmem is not built .*WIDEEP_NVSHMEM=ON"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(installed, what, message):
    installed(**what)
    obstacle = _nvshmem.obstacle()
    assert obstacle is not None
    assert re.search(message, obstacle)


@pytest.mark.parametrize("version", ["3.4.5", "3.5.0", "4.0.0", None])
def test_nothing_is_in_the_way_of_what_is_new_enough(installed, version):
    installed(version=version)
    assert _nvshmem.obstacle() is None


def test_nodes_are_hosts_or_consecutive_ranks():
    hosts = ["a", "a", "b", "b"]
    assert _nvshmem.node_of_rank(4, None, hosts) == [0, 0, 1, 1]
    assert _nvshmem.node_of_rank(4, 1, hosts) == [0, 1, 2, 3]
    assert _nvshmem.node_of_rank(5, 2, ["a"] * 5) == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match=r"node_size: .* got 3 ranks a node, of which node 0 spans 2 hosts"):
        _nvshmem.node_of_rank(4, 3, hosts)
    with pytest.raises(
        ValueError, match=r"consecutive, got ranks on hosts \[0, 1, 0\]; order the mesh's devices"
    ):
        _nvshmem.node_of_rank(3, None, ["a", "b", "a"])
    assert _nvshmem.node_of_rank(3, 1, ["a", "b", "a"]) == [0, 1, 2]


def test_mirrors_stand_for_ranks_on_other_nodes():
    nodes = [0, 0, 1, 1]
    assert _nvshmem.mirrors_of(0, nodes) == [-1, -1, 0, 1]
    assert _nvshmem.mirrors_of(2, nodes) == [0, 1, -1, -1]
    assert _nvshmem.mirrors_of(1, [0, 1, 2]) == [0, -1, 1]
    assert _nvshmem.mirrors_of(0, [0, 0]) == [-1, -1]


class FakeMemory:
    def __init__(self, addresses, number):
        self.address = (1 + number) << 20
        self.addresses = addresses

    def address_on(self, pe):
        return self.addresses[pe]


@pytest.fixture
def fake_modules(monkeypatch):
    """A module whose memory has these addresses on other PEs; records its calls. Rings take 10 bytes a node."""
    calls = {"bytes": []}

    def make(addresses):
        def allocate(device, num_bytes):
            calls["bytes"].append(num_bytes)
            return FakeMemory(addresses, len(calls["bytes"]) - 1)

        def made(name):
            def record(**arguments):
                calls[name] = arguments
                return name

            return record

        nvshmem = types.SimpleNamespace(
            allocate=allocate,
            make_relay=made("relay"),
            make_two_hop=made("two_hop"),
            two_hop_bytes=lambda node_of_rank, chunk: 10 * len(set(node_of_rank)),
        )
        cuda = types.SimpleNamespace(arena_bytes=lambda num_ranks, chunk: 1000 * num_ranks + chunk)
        monkeypatch.setattr(_ffi, "nvshmem_module", lambda: nvshmem)
        monkeypatch.setattr(_ffi, "cuda_module", lambda: cuda)
        return calls

    return make


def test_an_arena_on_one_node_is_where_nvshmem_has_it(fake_modules):
    calls = fake_modules([7, 8, 9])
    arena = _nvshmem.make_arena(1, [0, 0, 0], [[0, 0, 0]], [2, 0, 1], 0, {"chunk": 5})
    assert arena.address == 1 << 20 and arena.across is None
    assert arena.addresses == [9, 1 << 20, 8]
    assert arena.mirrored == [False] * 3
    assert calls == {"bytes": [3005 + 128]}


def test_ranks_on_other_nodes_are_written_to_mirrors(fake_modules):
    calls = fake_modules([7, 8, 9, 10])
    nodes = [0, 0, 1, 1]
    arena = _nvshmem.make_arena(2, nodes, [nodes], [0, 1, 2, 3], 0, {"chunk": 0})
    base, size = 1 << 20, 4000
    # The arena, then a mirror each of ranks 0 and 1, inside of what was allocated; and the rings.
    assert arena.addresses == [base + size, base + 2 * size, base, 10]
    assert arena.mirrored == [True, True, False, False]
    assert calls["bytes"][0] >= 3 * size + 8
    assert calls["bytes"][1:] == [20]
    assert arena.across == ("relay", "two_hop")
    assert calls["relay"]["mirror_of_rank"] == [0, 1, -1, -1]
    for made in ("relay", "two_hop"):
        assert calls[made]["pe_of_rank"] == [0, 1, 2, 3] and calls[made]["rank"] == 2
    assert calls["two_hop"]["node_of_rank"] == nodes
    assert calls["two_hop"]["arena"].address == base and calls["two_hop"]["rings"].address == 2 * base


def test_groups_side_by_side_allocate_alike(fake_modules):
    """One group is on a node, the other is on three: NVSHMEM wants the same sizes of both."""
    by_group = []
    one, three = [0, 0, 0], [0, 1, 2]
    for nodes in (one, three):
        calls = fake_modules([7, 8, 9])
        calls["bytes"].clear()
        arena = _nvshmem.make_arena(1, nodes, [one, three], [0, 1, 2], 0, {"chunk": 0})
        by_group.append(list(calls["bytes"]))
        assert (arena.across is None) == (nodes is one)
    assert by_group[0] == by_group[1] == [3 * 3000 + 128, 30]


@pytest.mark.parametrize(
    ("nodes", "addresses", "rank", "words"),
    [
        ([0, 0], [0, 8], 1, r"ranks \[0\] are on the node of rank 1 but cannot be reached"),
        # Rank 0 would have a mirror left over, of the larger node.
        ([0, 0, 1], [7, 0, 9], 0, r"ranks \[1\] are on the node of rank 0 but cannot be reached"),
    ],
)
def test_ranks_of_a_node_that_cannot_reach_each_other_are_refused(
    fake_modules, nodes, addresses, rank, words
):
    fake_modules(addresses)
    with pytest.raises(RuntimeError, match=words):
        _nvshmem.make_arena(rank, nodes, [nodes], list(range(len(nodes))), 0, {"chunk": 0})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(transport="rdma"), r"transport: expected one of \('auto', 'peer', 'nvshmem'\), got 'rdma'"),
        (dict(node_size=0), r"node_size: expected None or an int of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("expert",))
    with pytest.raises(ValueError, match=message):
        wep.ExpertGroup(mesh, num_experts=4, top_k=1, hidden=8, backend="xla", **setting)
