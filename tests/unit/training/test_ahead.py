import threading
import time

import pytest
import torch

from medvisionllama.training.ahead import Ahead


def square(number):
    time.sleep(0.001 * (number % 3))
    return number**2


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_what_is_asked_for_is_what_comes_at_any_number(num_threads):
    with Ahead(square, num_threads) as ahead:
        assert [ahead[number] for number in [5, 6, 7, 7, 20, 3, 4]] == [25, 36, 49, 49, 400, 9, 16]


def test_the_next_ones_are_made_before_they_are_asked_for():
    made, third = [], threading.Event()

    def make(number):
        made.append(number)
        if len(made) == 3:
            third.set()
        return number

    with Ahead(make, 2) as ahead:
        assert ahead[0] == 0
        assert third.wait(10)
        assert sorted(made) == [0, 1, 2]
        assert [ahead[number] for number in range(5)] == list(range(5))
    assert sorted(set(made)) == sorted(made), "none is made twice"


def test_without_threads_nothing_is_made_that_was_not_asked_for():
    made = []
    with Ahead(made.append, 0) as ahead:
        ahead[0], ahead[1]
    assert made == [0, 1]


def test_a_failure_is_raised_where_its_batch_is_asked_for():
    def make(number):
        if number == 2:
            raise ValueError("scan 2 is damaged")
        return number

    with Ahead(make, 2) as ahead:
        assert [ahead[0], ahead[1]] == [0, 1]
        with pytest.raises(ValueError, match="scan 2 is damaged"):
            ahead[2]


def test_the_threads_are_gone_afterwards():
    with Ahead(square, 2) as ahead:
        ahead[0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch")]


def test_threads_of_one_core_each_leave_all_others_as_they_are():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Ahead(lambda _: torch.get_num_threads(), 2, one_core_each=True) as ahead:
            assert [ahead[number] for number in range(5)] == [1] * 5
            assert torch.get_num_threads() == 3
        with Ahead(lambda _: torch.get_num_threads(), 2) as ahead:
            assert ahead[0] == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
