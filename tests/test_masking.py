"""How processes meet to change a group's mask: threads with a store between them stand for the processes."""

import threading
import time
import types

import numpy as np
import pytest

from jax_wideep import _masking, _peer_transport


class Store:
    """JAX's key-value store, as far as it is used."""

    def __init__(self):
        self._values = {}
        self._changed = threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._changed:
            assert allow_overwrite or key not in self._values
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_in_ms / 1e3):
                raise RuntimeError("DEADLINE_EXCEEDED: no such key")
            return self._values[key]


class LostStore:
    def key_value_set(self, *_, **__):
        raise RuntimeError("UNAVAILABLE: failed to connect")

    blocking_key_value_get = key_value_set


class Transport:
    """Remembers its masks, and when each was set."""

    def __init__(self, error=None):
        self.masks = []
        self.error = error

    def wait(self):
        pass

    def mask(self, ranks):
        if self.error is not None:
            raise RuntimeError(self.error)
        self.masks.append(tuple(ranks))


def call_together(store, calls, processes, timeout_s=20.0):
    """Each process's result: an exception or None. `calls`: (transport, ranks, seconds after which it calls)."""
    results = {}

    def run(process, transport, ranks, after_s):
        time.sleep(after_s)
        try:
            _masking.change_together(transport, ranks, processes, process, store, timeout_s)
            results[process] = None
        except Exception as error:
            results[process] = error

    threads = [threading.Thread(target=run, args=(process, *call)) for process, call in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_again_and_again():
    """Masks of changing processes, all through one store."""
    store = Store()
    transports = {process: Transport() for process in (0, 1, 2)}
    for ranks, processes in (([2], [0, 1]), ([], [0, 1, 2]), ([0], [1, 2]), ([], [0, 1, 2]), ([], [0, 1, 2])):
        calls = {process: (transports[process], ranks, 0.0) for process in processes}
        assert call_together(store, calls, processes) == dict.fromkeys(processes)
    assert transports[0].masks == [(2,), (), (), ()]
    assert transports[1].masks == [(2,), (), (0,), (), ()]


@pytest.mark.parametrize("late", [0, 2])
def test_nothing_changes_before_all_have_come(late):
    store, came = Store(), 0.3
    transports = {process: Transport() for process in (0, 1, 2)}
    began = time.monotonic()
    times = []
    for process, transport in transports.items():
        transport.mask = lambda ranks, process=process: times.append((time.monotonic() - began, process))
    calls = {p: (transports[p], [], came if p == late else 0.0) for p in transports}
    assert call_together(store, calls, [0, 1, 2]) == dict.fromkeys([0, 1, 2])
    assert len(times) == 3 and min(times)[0] >= came


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_process_that_does_not_come(missing):
    """It is an error, nothing has changed, and a later call is not misled by what the first one left."""
    store = Store()
    transports = {process: Transport() for process in (0, 1, 2)}
    calls = {process: (transports[process], [], 0.0) for process in (0, 1, 2) if process != missing}
    results = call_together(store, calls, [0, 1, 2], timeout_s=0.3)
    for error in results.values():
        assert isinstance(error, RuntimeError) and "in vain" in str(error)
    assert all(transport.masks == [] for transport in transports.values())
    # The one that was missing comes first this time, alone with the traces of the others.
    calls = {p: (transports[p], [1], 0.0 if p == missing else 0.4) for p in (0, 1, 2)}
    assert call_together(store, calls, [0, 1, 2]) == dict.fromkeys([0, 1, 2])
    assert all(transport.masks == [(1,)] for transport in transports.values())


def test_different_ranks():
    transports = {process: Transport() for process in (0, 1)}
    results = call_together(Store(), {0: (transports[0], [2], 0.0), 1: (transports[1], [3], 0.0)}, [0, 1])
    for error in results.values():
        assert isinstance(error, ValueError)
        assert "ranks: process 0 has [2], process 1 has [3]" in str(error)
    assert all(transport.masks == [] for transport in transports.values())


def test_a_change_that_fails_on_one_process():
    transports = {0: Transport(), 1: Transport("reset: out of order")}
    results = call_together(Store(), {p: (t, [], 0.0) for p, t in transports.items()}, [0, 1])
    for error in results.values():
        assert isinstance(error, RuntimeError) and "process 1: reset: out of order" in str(error)


def test_without_a_coordination_service():
    with pytest.raises(RuntimeError, match="does not answer"):
        _masking.change_together(Transport(), [], [0, 1], 0, LostStore(), 5.0)
    with pytest.raises(RuntimeError, match="initialize was not called"):
        _masking.change_together(Transport(), [], [0, 1], 0, None, 5.0)


def test_gpus_are_idle_before_their_memory_is_reset():
    """In one process, which has nobody to meet."""
    calls = []
    module = types.SimpleNamespace(
        wait_for_group=lambda handle: calls.append(("wait", handle)),
        mask_group=lambda handle, ranks: calls.append(("mask", handle, ranks)),
    )
    transport = _peer_transport.PeerTransport(module, 7, 16, "push", "pull")
    device = types.SimpleNamespace(process_index=0)
    _masking.change(transport, np.array([[device]] * 4), (1, 3), 1.0)
    assert calls == [("wait", 7), ("mask", 7, [1, 3])]
