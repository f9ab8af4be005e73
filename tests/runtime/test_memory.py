"""Running out of memory: the same step in smaller pieces, and clear words where that is no help."""

from __future__ import annotations

import contextlib

import pytest
import torch

from latent_reasoning.runtime.command import run_stage
from latent_reasoning.runtime.memory import OutOfMemoryError, in_halves, is_out_of_memory
from latent_reasoning.runtime.signals import TrainingInterruptedError
from tests.training.tiny_training import (
    TinyPlan,
    TinyTask,
    assert_bitwise_equal,
    out_of_time,
    run,
    tiny_model,
    weights,
)


@pytest.mark.parametrize("rows", [3, 2, 1])
def test_a_training_that_runs_out_of_memory_equals_one_with_smaller_micro_batches(
    tmp_path, log, rows
):
    short, small = tiny_model(), tiny_model()
    size = 2 if rows > 1 else 1
    result = run(tmp_path / "a", TinyTask(short, memory=lambda _: rows), log=log)
    plan = TinyPlan(micro_batch_size=size)
    expected = run(tmp_path / "b", TinyTask(small, plan=plan), log=[])
    assert_bitwise_equal(weights(short), weights(small))
    assert result.metrics.read_text() == expected.metrics.read_text()
    warnings = [line for line in log if line.startswith("warning")]
    first = (
        "warning: tiny: out of memory at step 1 with micro-batches of 4, continues with 2; "
        "the batch stays the same (CUDA out of memory. Tried to allocate 2 GiB.)"
    )
    assert warnings[0] == first
    assert len(warnings) == {2: 1, 1: 2}[size]


def test_the_smaller_size_survives_a_kill(tmp_path):
    def short_of_memory_once(step: int) -> int:
        return 2 if step == 2 else 4

    whole, pieces = tiny_model(), tiny_model()
    run(tmp_path / "a", TinyTask(whole, memory=short_of_memory_once))
    for _ in range(7):
        task = TinyTask(pieces, memory=short_of_memory_once)
        stop = out_of_time()
        with pytest.raises(TrainingInterruptedError):
            run(tmp_path / "b", task, stop=stop)
    last = TinyTask(pieces, memory=short_of_memory_once)
    run(tmp_path / "b", last)
    assert last.plan.micro_batch_size == 2
    assert_bitwise_equal(weights(pieces), weights(whole))


def test_a_single_example_that_is_too_much_says_what_helps(tmp_path):
    task = TinyTask(tiny_model(), memory=lambda step: 4 if step < 5 else 0)
    with pytest.raises(OutOfMemoryError) as caught:
        run(tmp_path / "c", task)
    assert str(caught.value) == (
        "tiny: out of memory with a single example (CUDA out of memory. Tried to allocate 2 GiB.): "
        "give the job more memory, set runtime.precision to bfloat16 (on a GPU), train an adapter "
        "(lora), or lower data.max_tokens or (RL) group_size"
    )


def test_the_allocators_errors_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried .."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when .."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("expected scalar type Float"))
    assert not is_out_of_memory(ValueError("out of memory"))


@contextlib.contextmanager
def capture():
    """Ends as torch.cuda.graph does where the work in it fails."""
    try:
        yield
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("error", "expected"),
    [(torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("illegal"), False)],
)
def test_memory_that_ends_while_a_graph_is_captured_is_recognised(error, expected):
    with pytest.raises(RuntimeError, match="previous error") as caught, capture():
        raise error
    assert is_out_of_memory(caught.value) is expected


def test_work_is_done_in_halves_until_it_fits_and_comes_out_in_order(capsys):
    sizes = []

    def double(items: list[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * item for item in items]

    assert in_halves(double, list(range(11))) == [2 * item for item in range(11)]
    assert sizes == [11, 5, 2, 3, 6, 3, 3]
    assert (
        "warning: out of memory with 11 prompts at a time, continues with 5"
        in capsys.readouterr().err
    )


def test_a_single_prompt_that_is_too_much_is_an_error():
    def fail(items):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match=r"single prompt \(CUDA out of memory\)"):
        in_halves(fail, [1, 2])


def test_a_stage_that_runs_out_of_memory_elsewhere_says_so_in_one_line(capsys):
    def main(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails.")

    with pytest.raises(SystemExit) as caught:
        run_stage(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: out of memory (CUDA out of memory. Tried to allocate 2 GiB.): lower "
        "runtime.micro_batch_size or runtime.evaluation_batch_size, or give the job more memory\n"
    )
