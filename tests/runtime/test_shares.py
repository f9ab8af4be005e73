"""How work is dealt over processes, and what is refused."""

from __future__ import annotations

import pytest

from latent_reasoning.config import ConfigError, Runtime, Training
from latent_reasoning.runtime.parallel import ALONE, OneProcess, SeveralProcesses
from latent_reasoning.training.batches import BatchPlan


def plan(batch_size: int, micro_batch_size: int | None, processes: OneProcess = ALONE) -> BatchPlan:
    training = Training(steps=1, batch_size=batch_size)
    runtime = Runtime(micro_batch_size=micro_batch_size)
    return BatchPlan([5] * 20, training, runtime, seed=0, name="plan", processes=processes)


def test_one_process_has_everything_to_itself():
    assert ALONE.is_main
    assert ALONE.share([1, 2, 3]) == ALONE.gather([1, 2, 3]) == [1, 2, 3]
    assert [ALONE.any_rank(flag) for flag in (False, True)] == [False, True]
    assert ALONE.purpose("rl step 3") == "rl step 3"


def test_each_item_is_in_one_share():
    shares = [SeveralProcesses(rank, 3).share(range(8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    sizes = [SeveralProcesses(0, 4).share_size(size) for size in (8, 9, 10, 3)]
    assert sizes == [2, 2, 3, 1]  # nine in threes would leave the fourth process none


def test_only_the_first_process_draws_the_dropout_of_one_process():
    purposes = [SeveralProcesses(rank, 2).purpose("sft step 3") for rank in range(2)]
    assert purposes == ["sft step 3", "sft step 3 process 1"]


def test_an_undivided_batch_has_a_micro_batch_for_each_process():
    alone = [sorted(part) for part in plan(10, 4).micro_batches(0)]
    second = SeveralProcesses(1, 3)
    divided = plan(10, None, second).micro_batches(0)
    assert [len(part) for part in divided] == [4, 4, 2]
    # A micro-batch size is kept to, whatever the processes.
    assert [sorted(part) for part in plan(10, 4, second).micro_batches(0)] == alone


@pytest.mark.parametrize(
    ("batch", "micro", "message"),
    [
        (10, 5, "of 10 in micro-batches of 5; lower runtime.micro_batch_size, or it"),
        (2, None, "runtime.processes: 3 processes have no work for each in a batch of 2"),
    ],
)
def test_a_process_without_work_is_refused(batch, micro, message):
    with pytest.raises(ConfigError, match=message):
        plan(batch, micro, SeveralProcesses(1, 3))
