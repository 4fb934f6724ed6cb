"""Threads: results in order, and no more at once than a budget allows."""

import threading

import pytest

from ddpm_cli.data.work import Budget, in_threads
from processes import GUARD

THREADS = 8


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    """The same number on any machine."""
    monkeypatch.setattr("ddpm_cli.data.work.usable_cpus", lambda: THREADS)


def test_results_come_in_order_and_work_is_never_far_ahead():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        return -item

    for done, result in enumerate(in_threads(work, range(1000))):
        assert result == -done
        assert len(begun) <= done + 4 * THREADS + 1


@pytest.mark.parametrize("whole", [100, 7, 1, 0])
def test_a_budget_is_never_exceeded(whole):
    """By amounts from 0 to much more than the limit. Those above it run alone."""
    budget, held, exceeded = Budget(whole), [], []

    def work(amount: int) -> int:
        with budget.spend(amount):
            held.append(amount)  # both are atomic
            now = list(held)
            if sum(now) > whole and sum(other > 0 for other in now) > 1:
                exceeded.append(now)
            held.remove(amount)
        return amount

    amounts = [(i * i * 7) % 13 * (whole + 1) // 10 for i in range(2000)]
    assert list(in_threads(work, amounts)) == amounts
    assert not exceeded


def test_amounts_that_fit_together_run_together():
    budget, all_there = Budget(THREADS), threading.Barrier(THREADS)

    def work(amount: int) -> int:
        with budget.spend(amount):
            return all_there.wait(GUARD)

    assert sorted(in_threads(work, [1] * THREADS)) == list(range(THREADS))


def test_a_block_that_fails_returns_its_amount():
    budget = Budget(10)
    for _ in range(3):
        with pytest.raises(OSError, match="damaged"), budget.spend(10):
            raise OSError("damaged")
    with budget.spend(10):
        pass
