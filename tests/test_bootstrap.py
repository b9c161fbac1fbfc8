"""How processes meet while a group is set up, with threads in the place of processes."""

import concurrent.futures
import os
import socket
import threading

import pytest

from jax_wideep import _bootstrap


class MemoryStore:
    """A key-value store with the coordination client's methods."""

    def __init__(self):
        self.values = {}
        self.changed = threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values, f"{key} is set twice"
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1e3):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]


def meet(processes, body, *, store=None, timeout_s=10.0, absent=()):
    """`body(meeting)` as each process; results or exceptions by process."""
    store = store or MemoryStore()

    def one(process):
        meeting = _bootstrap.Bootstrap(processes, process, store, timeout_s)
        meeting.name = "wideep/test"  # threads share the counter that numbers meetings
        try:
            return body(meeting)
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        running = {p: pool.submit(one, p) for p in processes if p not in absent}
        return {p: future.result(timeout=30) for p, future in running.items()}


def memory_file(text):
    number = os.memfd_create("test")
    os.write(number, text.encode())
    return number


def read(number):
    return os.pread(number, 100, 0).decode()


@pytest.mark.parametrize("processes", [(0,), (0, 1), (2, 5, 9), tuple(range(8))])
def test_descriptors_come_from_everyone_to_everyone(processes):
    def body(meeting):
        own = [memory_file(f"{meeting.process}.{i}") for i in range(meeting.process % 3)]
        received = meeting.all_gather_descriptors(own)
        texts = {p: [read(number) for number in numbers] for p, numbers in received.items()}
        _bootstrap.close_descriptors(received)
        assert [read(number) for number in own] == [f"{meeting.process}.{i}" for i in range(len(own))]
        _bootstrap.close_descriptors({0: own})
        return texts

    before = len(os.listdir("/proc/self/fd"))
    for process, texts in meet(processes, body).items():
        assert texts == {p: [f"{p}.{i}" for i in range(p % 3)] for p in processes if p != process}
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_are_used_once_and_counted_by_processes():
    first, second = (_bootstrap.Bootstrap((3, 4), 3, None, 1).name for _ in range(2))
    _bootstrap.Bootstrap((3,), 3, None, 1)
    third = _bootstrap.Bootstrap((4, 3), 3, None, 1).name
    assert [name.split("/")[:2] for name in (first, second, third)] == [["wideep", "3-4"]] * 3
    numbers = [int(name.split("/")[2]) for name in (first, second, third)]
    assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]


def test_missing_process_is_named():
    results = meet((0, 1, 2), lambda meeting: meeting.all_gather("hello", 1), timeout_s=0.2, absent=(1,))
    for error in results.values():
        assert isinstance(error, _bootstrap.BootstrapError)
        assert "process 1 did not come within 0.2 s" in str(error)


def test_process_that_sends_nothing_is_named():
    def body(meeting):
        if meeting.process == 2:
            meeting.all_gather("descriptors", {"address": "nobody", "token": "00" * 32})
            return None
        return meeting.all_gather_descriptors([])

    error = meet((0, 2), body, timeout_s=0.3)[0]
    assert isinstance(error, _bootstrap.BootstrapError)
    assert "processes [2] sent no descriptors" in str(error)


def test_strangers_are_turned_away():
    """Who finds the socket but does not know the secret gets nothing, and holds nobody up."""

    def body(meeting):
        if meeting.process == 0:
            received = meeting.all_gather_descriptors([])
            texts = [read(number) for number in received[1]]
            _bootstrap.close_descriptors(received)
            return texts
        secret = bytes(range(32))
        hello = meeting.all_gather("descriptors", {"address": "unused", "token": secret.hex()})[0]
        for token, text in ((secret, "bad"), (bytes.fromhex(hello["token"]), "good")):
            number = memory_file(text)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
                peer.settimeout(10)
                peer.connect("\0" + hello["address"])
                _bootstrap._send(peer, token, 1, [number])
                os.close(number)
                answer = peer.recv(100)
            assert (answer[:32] == secret) == (text == "good")
        return "done"

    assert meet((0, 1), body) == {0: ["good"], 1: "done"}


def test_first_difference_names_both_sides():
    same = {"hidden": 128, "top_k": 2}
    assert _bootstrap.first_difference({0: same, 1: dict(same)}) is None
    difference = _bootstrap.first_difference({0: same, 1: dict(same), 2: same | {"hidden": 256}})
    assert difference == "hidden: process 0 has 128, process 2 has 256"
    assert "chunk: process 0 has None" in _bootstrap.first_difference({0: same, 1: same | {"chunk": 4}})
