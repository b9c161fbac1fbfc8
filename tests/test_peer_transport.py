"""How groups of GPUs are set up, with threads in the place of processes and a stand-in for the CUDA module; and what
the ops are lowered to for CUDA."""

import dataclasses
import os
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_bootstrap import MemoryStore, memory_file, read

import jax_wideep as wep
from jax_wideep import _bootstrap, _ffi, _nvshmem, _peer_transport

here = threading.local()


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    local_hardware_id: int


class FakeRank:
    """A rank's memory is a file that says whose it is."""

    def __init__(self, device, rank, regions, spans_processes, mapping_fails):
        self.name = f"{here.process}.{device}"
        self.rank = rank
        self.arena = [hash(self.name) & 0xFFFF, 1 << 20]
        self.regions = [[i, 1 << 30] for i in range(regions)]
        self.spans_processes = spans_processes
        self.mapping_fails = mapping_fails
        self.peers = {}
        self.finished = False

    def take_descriptors(self):
        names = [self.name, *(f"{self.name}/{i}" for i in range(len(self.regions)))]
        return [memory_file(name) for name in names] if self.spans_processes else []

    def map_peer(self, rank, arena, regions, descriptors):
        if self.mapping_fails:
            raise RuntimeError("cuMemMap: CUDA_ERROR_INVALID_DEVICE")
        assert isinstance(arena, tuple) and all(isinstance(region, tuple) for region in regions)
        self.peers[rank] = [read(number) for number in descriptors]

    def map_local_peer(self, peer):
        self.peers[peer.rank] = [peer.name]

    def finish(self):
        self.finished = True


class FakeModule:
    __file__ = __file__

    def __init__(self, num_sms=132, compute_capability=90, gpus_of_host=1, regions=1, mapping_fails_in=None):
        self.gpu = {"num_sms": num_sms, "compute_capability": compute_capability}
        self.gpus_of_host = gpus_of_host
        self.regions = regions
        self.mapping_fails_in = mapping_fails_in
        self.opened, self.closed, self.across = {}, [], {}

    def exchange_limits(self):
        return {"num_ranks": 16, "num_experts": 2048, "top_k": 24}

    def device_info(self, device):
        return {"uuid": f"gpu{(here.process + device) % self.gpus_of_host}", **self.gpu}

    def make_peer_group(self, device, rank, spans_processes, **settings):
        assert settings["max_row_bytes"] == 4 * 256 and settings["num_sms"] >= 2
        return FakeRank(device, rank, self.regions, spans_processes, here.process == self.mapping_fails_in)

    def open_group(self, ranks, deadline_s, top_k, zero_copy, across_nodes):
        self.opened[here.process] = ranks
        self.across[here.process] = across_nodes
        return 1

    def close_group(self, handle):
        self.closed.append(handle)

    def group_error(self, handle):
        return None


@pytest.fixture
def connect_all(monkeypatch):
    """Connects as every process of a mesh [ranks, subgroups] of process numbers: results or exceptions by process."""
    store = MemoryStore()

    class Meeting(_bootstrap.Bootstrap):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.name = "wideep/test"

    monkeypatch.setattr(_bootstrap, "Bootstrap", Meeting)
    monkeypatch.setattr(_ffi, "coordination_client", lambda: store)
    monkeypatch.setattr(_bootstrap, "TIMEOUT_S", 10.0)
    buffer = types.SimpleNamespace(unsafe_buffer_pointer=lambda: 4096)
    fake_jax = types.SimpleNamespace(
        process_index=lambda: here.process, device_put=lambda array, device: buffer
    )
    monkeypatch.setattr(_peer_transport, "jax", fake_jax)

    def connect(processes, module, **settings):
        monkeypatch.setattr(_ffi, "cuda_module", lambda: module)
        processes = np.asarray(processes)
        seen = {}
        devices = np.empty(processes.shape, object)
        for at, process in np.ndenumerate(processes):
            ordinal = seen[process] = seen.get(process, -1) + 1
            devices[at] = FakeDevice(len(seen) * 100 + ordinal, int(process), ordinal)
        results = {}

        def one(process):
            here.process = process
            own = {name: value(process) if callable(value) else value for name, value in settings.items()}
            try:
                results[process] = _peer_transport.connect(peer_settings(devices, **own))
            except Exception as error:
                results[process] = error

        threads = [
            threading.Thread(target=one, args=(process,)) for process in set(processes.reshape(-1).tolist())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        return results

    return connect


def peer_settings(devices, **more):
    settings = {
        "num_experts": 64, "top_k": 4, "hidden": 256, "chunk": 128, "deadline_s": 3.0, "num_sms": None,
        "zero_copy": "auto", "dispatch_form": "auto", "combine_form": "auto",
    }  # fmt: skip
    return _peer_transport.PeerSettings(devices=devices, **(settings | more))


@pytest.mark.parametrize("regions", [0, 1, 3])
def test_every_rank_maps_the_others_of_its_subgroup(connect_all, regions):
    """Three processes of two devices: two subgroups of three ranks, one of them over all processes."""
    module = FakeModule(regions=regions, gpus_of_host=16)
    before = len(os.listdir("/proc/self/fd"))
    results = connect_all([[0, 1], [1, 2], [2, 0]], module)
    assert all(isinstance(result, _peer_transport.PeerTransport) for result in results.values()), results
    names = {0: ["0.0", "1.1", "2.1"], 1: ["1.0", "2.0", "0.1"]}  # [subgroup][rank]: process.device

    def files(name):
        return [name, *(f"{name}/{i}" for i in range(regions))]

    for ranks in module.opened.values():
        for rank in ranks:
            subgroup = next(s for s, members in names.items() if rank.name in members)
            others = {r: name for r, name in enumerate(names[subgroup]) if r != rank.rank}
            assert names[subgroup][rank.rank] == rank.name and rank.finished
            assert rank.peers == {r: files(name) for r, name in others.items()}
    assert len(os.listdir("/proc/self/fd")) == before
    results[1].close()
    results[1].close()
    assert module.closed == [1]


def test_one_process_needs_no_service(connect_all, monkeypatch):
    module = FakeModule(gpus_of_host=4)
    monkeypatch.setattr(_ffi, "coordination_client", lambda: None)
    assert connect_all([[0], [0], [0]], module)[0].handle == 1
    assert [rank.peers for rank in module.opened[0]] == [
        {r: [f"0.{r}"] for r in range(3) if r != rank} for rank in range(3)
    ]


def test_settings_that_differ_are_named(connect_all):
    results = connect_all([[0], [1]], FakeModule(), top_k=lambda process: 4 + process)
    for error in results.values():
        assert isinstance(error, ValueError)
        assert "top_k: process 0 has 4, process 1 has 5" in str(error)


def test_what_stands_in_the_way_is_known_everywhere(connect_all):
    for module, settings, words in (
        (None, {}, "_wideep_cuda is not built"),
        (FakeModule(compute_capability=80), {}, "compute capability 9.0 is needed, got 8.0"),
        (FakeModule(), {"top_k": 32}, "top_k of at most 24 is supported, got 32"),
        (FakeModule(mapping_fails_in=1), {}, "process 1: cuMemMap: CUDA_ERROR_INVALID_DEVICE"),
    ):
        _ffi.coordination_client().values.clear()
        for error in connect_all([[0], [1]], module, **settings).values():
            assert isinstance(error, _bootstrap.UnavailableError), error
            assert words in str(error)


@pytest.mark.parametrize(
    ("asked", "hosts", "expected"),
    [
        ("auto", ["a", "a"], False),
        ("auto", ["a", "a", "b"], True),
        ("peer", ["a", "b"], False),
        ("nvshmem", ["a", "a"], True),
    ],
)
def test_nvshmem_is_for_several_hosts(asked, hosts, expected):
    assert _peer_transport.goes_over_nvshmem(asked, hosts) is expected


def test_blocks_of_ranks_that_share_a_gpu_fit():
    gpu = {"uuid": "a", "num_sms": 132}
    other = {"uuid": "b", "num_sms": 132}
    assert _peer_transport.choose_num_sms(None, 2, [gpu, other]) == 32
    # Those of two exchanges at once; asked for, of one.
    assert _peer_transport.choose_num_sms(None, 8, [gpu] * 8) == 8
    assert _peer_transport.choose_num_sms(None, 11, [gpu] * 11) == 6
    assert _peer_transport.choose_num_sms(16, 8, [gpu] * 8) == 16
    assert _peer_transport.choose_num_sms(24, 5, [gpu] * 5) == 24
    with pytest.raises(
        ValueError, match="num_sms: expected 2 to 16, got 18: up to 8 ranks share a GPU of 132 SMs"
    ):
        _peer_transport.choose_num_sms(18, 9, [gpu] * 8 + [other])


def test_group_of_one_rank_takes_its_gpu():
    gpu = {"uuid": "a", "num_sms": 132}
    assert _peer_transport.choose_num_sms(None, 1, [gpu]) == 132
    assert _peer_transport.choose_num_sms(None, 1, [{"uuid": "a", "num_sms": 115}]) == 114
    assert _peer_transport.choose_num_sms(16, 1, [gpu]) == 16
    # Eight such groups side by side on one GPU.
    assert _peer_transport.choose_num_sms(None, 1, [gpu] * 8) == 16


def test_rule_of_forms():
    def forms(num_ranks, top_k, shares_memory=False, **asked):
        settings = peer_settings(np.zeros((num_ranks, 1)), top_k=top_k, **asked)
        return _peer_transport.choose_forms(settings, shares_memory)

    assert forms(8, 8) == ("pull", "reduce")  # 5.25 ranks a token
    assert forms(8, 8, shares_memory=True) == ("push", "pull")
    assert forms(16, 4) == ("push", "pull")
    assert forms(1, 8) == ("push", "pull")
    assert forms(8, 8, dispatch_form="push", combine_form="push") == ("push", "push")
    assert forms(8, 8, combine_form="pull") == ("pull", "pull")
    assert forms(16, 4, combine_form="reduce") == ("push", "reduce")


@pytest.mark.parametrize(("combine_form", "form", "num_results"), [("push", 1, 1), ("reduce", 2, 2)])
def test_ops_are_lowered_to_the_handlers_of_cuda(make_group, combine_form, form, num_results):
    group = make_group(4, num_experts=8, top_k=2, hidden=256, backend="cpu")
    for name, value in {"backend": "cuda", "dispatch_form": "pull", "combine_form": combine_form}.items():
        object.__setattr__(group, name, value)

    def body(x, weights, topk_idx):
        def forward(x, weights):
            plan = wep.make_plan(topk_idx, group)
            rows, row_weights = wep.dispatch(x, weights, plan)
            fp8_rows, _ = wep.dispatch(x, weights, plan, quantize="fp8")
            return wep.combine(rows + fp8_rows, row_weights, plan)

        out, backward = jax.vjp(forward, x, weights)
        return backward(out)

    shapes = [
        jax.ShapeDtypeStruct((4 * 6, *columns), dtype)
        for columns, dtype in (((256,), jnp.bfloat16), ((2,), jnp.float32), ((2,), jnp.int32))
    ]
    text = oracle.on_ranks(group, body).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = {}
    for line in text.splitlines():
        if "custom_call @wideep_" in line:
            target, rest = line.split("custom_call @", 1)[1].split("(", 1)
            calls.setdefault(target, []).append((rest.split(")")[0].count("%"), line))
    operands = {target: {count for count, _ in found} for target, found in calls.items()}
    assert operands == {
        "wideep_plan": {1},
        "wideep_dispatch": {8},
        "wideep_dispatch_grad": {8},
        "wideep_combine": {8},
        "wideep_combine_grad": {9},
        "wideep_quantize_rows": {1},
    }
    assert all("form = 1 : i32" in line for _, line in calls["wideep_dispatch"])
    # The sums of "reduce" are one more result.
    for target, results in (("wideep_combine", num_results), ("wideep_dispatch_grad", num_results + 1)):
        for _, line in calls[target]:
            assert f"form = {form} : i32" in line
            assert line.split("->")[-1].count("tensor<") == results
    assert any(
        "tensor<24x272xui8>" in line or "tensor<6x272xui8>" in line for _, line in calls["wideep_dispatch"]
    )


class NvshmemRank(FakeRank):
    """Its arena is another transport's: no descriptor goes with it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.arenas = {}

    def take_descriptors(self):
        return [memory_file(f"{self.name}/{i}") for i in range(len(self.regions))]

    def set_arena(self, rank, address, mirror):
        self.arenas[rank] = (address, mirror)


class NvshmemModule(FakeModule):
    def make_peer_group(self, device, rank, spans_processes, arena_address, **settings):
        assert arena_address == 1000 + rank
        fails = here.process == self.mapping_fails_in
        return NvshmemRank(device, rank, self.regions, spans_processes, fails)


@pytest.fixture
def fake_nvshmem(monkeypatch):
    """Arenas of rank r at 1000 + r, mirrors at 2000 + r. What starts, by process."""
    started = {}

    def make_arena(rank, nodes, all_nodes, pe_of_rank, device, sizes):
        assert nodes in all_nodes and sizes["max_row_bytes"] == 4 * 256
        assert len(pe_of_rank) == len(nodes)
        mirrored = [node != nodes[rank] for node in nodes]
        across = (f"relay {rank}", f"two hops {rank}") if any(mirrored) else None
        addresses = [1000 * (1 + mirror) + peer for peer, mirror in enumerate(mirrored)]
        return _nvshmem.Arena(1000 + rank, addresses, mirrored, across)

    monkeypatch.setattr(_nvshmem, "obstacle", lambda: None)
    monkeypatch.setattr(_nvshmem, "make_arena", make_arena)
    monkeypatch.setattr(
        _nvshmem,
        "start",
        lambda meeting, device, hosts: started.setdefault(meeting.process, meeting.processes),
    )
    return started


@pytest.fixture
def descriptors_swapped(monkeypatch):
    """Which processes met to swap descriptors, by process."""
    met = {}
    swap = _bootstrap.Bootstrap.all_gather_descriptors

    def recorded(meeting, descriptors):
        met[meeting.process] = meeting.processes
        return swap(meeting, descriptors)

    monkeypatch.setattr(_bootstrap.Bootstrap, "all_gather_descriptors", recorded)
    return met


@pytest.mark.parametrize("node_size", [None, 4, 2, 3, 1])
def test_ranks_of_a_node_map_each_other(connect_all, fake_nvshmem, descriptors_swapped, node_size):
    """NVSHMEM has the arenas; JAX's memory is mapped inside of nodes, and descriptors stay there."""
    module = NvshmemModule(gpus_of_host=16)
    results = connect_all(
        [[0], [1], [2], [3]], module, transport="nvshmem", node_size=node_size, combine_form="reduce"
    )
    assert all(isinstance(result, _peer_transport.PeerTransport) for result in results.values()), results
    assert fake_nvshmem == dict.fromkeys(range(4), (0, 1, 2, 3))
    size = node_size or 4
    for process, (rank,) in module.opened.items():
        node = [peer for peer in range(4) if peer // size == process // size]
        assert rank.finished
        assert rank.arenas == {
            peer: (1000 + peer, False) if peer in node else (2000 + peer, True) for peer in range(4)
        }
        assert rank.peers == {peer: [f"{peer}.0/0"] for peer in node if peer != process}
        assert descriptors_swapped.get(process, (process,)) == tuple(node)
        assert module.across[process] == ([] if size == 4 else [(f"relay {process}", f"two hops {process}")])
        # There is one way over nodes.
        assert results[process].combine_form == ("reduce" if size == 4 else "pull")


def test_nodes_of_groups_side_by_side_are_apart(connect_all, fake_nvshmem, descriptors_swapped, monkeypatch):
    """Two groups of two ranks; each lies on the hosts in the same way, over both."""
    monkeypatch.setattr(_bootstrap, "host_id", lambda: "ab"[here.process >= 2])
    module = NvshmemModule(gpus_of_host=16)
    results = connect_all([[0, 1], [2, 3]], module, transport="nvshmem")
    assert all(isinstance(result, _peer_transport.PeerTransport) for result in results.values()), results
    assert descriptors_swapped == {}
    assert all(rank.peers == {} and rank.finished for (rank,) in module.opened.values())
    assert all(len(across) == 1 for across in module.across.values())


@pytest.mark.parametrize("regions", [0, 1])
def test_without_zero_copy_every_rank_is_a_node(connect_all, fake_nvshmem, descriptors_swapped, regions):
    """Memory of JAX that cannot be mapped (no regions) does then."""
    module = NvshmemModule(gpus_of_host=16, regions=regions)
    results = connect_all([[0], [1], [2], [3]], module, transport="nvshmem", node_size=2, zero_copy="off")
    assert all(isinstance(result, _peer_transport.PeerTransport) for result in results.values()), results
    assert descriptors_swapped == {}
    assert all(len(across) == 1 for across in module.across.values())
    for process, (rank,) in module.opened.items():
        assert rank.peers == {}
        assert rank.arenas == {
            peer: (1000 + peer, False) if peer == process else (2000 + peer, True) for peer in range(4)
        }


@pytest.mark.parametrize(
    ("module", "settings", "kind", "words"),
    [
        ({"regions": 0}, {}, _bootstrap.UnavailableError, "JAX's memory of rank 0 cannot be mapped"),
        ({"regions": 0}, {}, _bootstrap.UnavailableError, "or set zero_copy='off'"),
        ({"mapping_fails_in": 1}, {}, _bootstrap.UnavailableError, "process 1: cuMemMap"),
    ],
)
def test_what_cannot_work_over_nodes_is_said_by_every_process(
    connect_all, fake_nvshmem, module, settings, kind, words
):
    module = NvshmemModule(gpus_of_host=16, **module)
    results = connect_all([[0], [1], [2], [3]], module, transport="nvshmem", node_size=2, **settings)
    for error in results.values():
        assert isinstance(error, kind), error
        assert words in str(error)
    assert module.opened == {}


def test_ranks_of_a_host_that_are_not_consecutive_are_refused(connect_all, fake_nvshmem, monkeypatch):
    monkeypatch.setattr(_bootstrap, "host_id", lambda: "ab"[here.process % 2])
    results = connect_all([[0], [1], [2], [3]], NvshmemModule(gpus_of_host=16), transport="nvshmem")
    assert all(isinstance(error, ValueError) and "consecutive" in str(error) for error in results.values()), (
        results
    )


def test_nvshmem_needs_a_process_for_each_gpu(connect_all, fake_nvshmem):
    results = connect_all([[0], [0], [1], [1]], NvshmemModule(gpus_of_host=16), transport="nvshmem")
    assert all("one process for each GPU, got one with 2" in str(result) for result in results.values()), (
        results
    )


def test_what_nvshmem_lacks_is_said_by_every_process(connect_all, fake_nvshmem, monkeypatch):
    monkeypatch.setattr(
        _nvshmem, "obstacle", lambda: "NVSHMEM 3.4.5 is needed" if here.process == 2 else None
    )
    results = connect_all([[0], [1], [2], [3]], NvshmemModule(gpus_of_host=16), transport="nvshmem")
    assert {str(result) for result in results.values()} == {"process 2: NVSHMEM 3.4.5 is needed"}
