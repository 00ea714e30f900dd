import os
from itertools import pairwise

import pytest

from scratch_det.data import forked
from scratch_det.data.forked import map_forked


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    monkeypatch.setattr(forked, "usable_cores", lambda: 3)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_results_in_the_order_of_the_items(count):
    assert list(map_forked(lambda item: (item, item**2), range(count), 2)) == [(k, k**2) for k in range(count)]


@pytest.mark.parametrize(("least", "processes"), [(2, 3), (4, 2), (11, 1)])
def test_neighbours_share_a_process(least, processes):
    found = list(map_forked(lambda item: os.getpid(), range(10), least))
    assert found[0] == os.getpid()
    assert len(set(found)) == processes
    assert len([pair for pair in pairwise(found) if len(set(pair)) == 2]) == processes - 1


def test_what_a_process_cannot_do_is_done_here():
    first = os.getpid()

    def work(item):
        if os.getpid() != first and item > 6:
            os._exit(9)  # as if killed for its memory
        return item, os.getpid() == first

    found = list(map_forked(work, range(9), 1))
    assert [item for item, _ in found] == list(range(9))
    assert [here for _, here in found] == [True] * 3 + [False] * 3 + [True] * 3


@pytest.mark.parametrize("wrong", [0, 8])
def test_an_exception_is_raised_as_without_processes(wrong):
    with pytest.raises(ZeroDivisionError):
        map_forked(lambda item: 1 // (item - wrong), range(9), 1)


@pytest.mark.parametrize("what", ["pickle.dump", "TemporaryFile", "get_context"])
def test_no_room_for_results_or_processes(monkeypatch, what):
    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(f"scratch_det.data.forked.{what}", full)
    assert list(map_forked(str, range(4), 1)) == ["0", "1", "2", "3"]
