"""Tiny trainings of every kind, run by one process or by several.

    accelerate launch .. -m tests.runtime.trainings FOLDER

leaves `{training}-{rank}.safetensors` with the final weights and `{training}-{rank}.jsonl` with the
logged metrics of each step, in float64. No dropout: its masks are each process's own. In the last
one, `faulty`, things go wrong on one process.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from latent_reasoning.config import (
    Data,
    Distillation,
    Guard,
    LatentSftModel,
    Lora,
    Model,
    RlModel,
    Runtime,
    SftModel,
    Training,
)
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row
from latent_reasoning.evaluation.evaluator import EvaluationSettings, validate
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_tokens import make_latent
from latent_reasoning.rl import reward
from latent_reasoning.rl.prompts import rl_prompts
from latent_reasoning.rl.reward import Outcome, judge_sample
from latent_reasoning.rl.task import AdaptiveLengthTask
from latent_reasoning.runtime import parallel
from latent_reasoning.runtime.parallel import ALONE, OneProcess, join_processes
from latent_reasoning.runtime.signals import StopRequest, TrainingInterruptedError
from latent_reasoning.sft.examples import token_sft_examples
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.training.checkpoints import CheckpointStore, trained_tensors
from latent_reasoning.training.loop import Trainer
from latent_reasoning.training.metrics import read_metrics
from latent_reasoning.training.text import TextTask
from tests.data.generated import generated_rows
from tests.model.models import build_base
from tests.sft.conftest import encode
from tests.training.tiny_training import (
    TinyPlan,
    TinyTask,
    out_of_time,
    run,
    tiny_model,
    weights,
)

STEPS = 4
LORA = Lora(r=2, alpha=4, dropout=0.0, target_modules=["q_proj", "up_proj"])
CODI = Distillation(codi_weight=2.0, meaned_weight=1.0)


def rows() -> list[Row]:
    """Questions of 1 to 3 steps; the first is asked three times, and pools its samples in RL."""
    rows = generated_rows(12)
    return [rows[0], rows[0], *rows]


class Parts:
    """What a training is made of, its weights in float64."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer(generated_texts(7))
        base = build_base("llama", vocabulary=len(self.tokenizer))
        self.plain = LatentReasoner(base, None).double()

    def latent(self, lora: bool = False) -> LatentReasoner:
        """The base made a latent reasoner, with an adapter where asked for."""
        torch.manual_seed(1)
        model = make_latent(self.plain.base, self.tokenizer, Model(start_token_from=" Results:"))
        if lora:
            attach_lora(model, LORA)
        return model.double()

    def validation(
        self, model: LatentReasoner, processes: OneProcess
    ) -> Callable[[], dict[str, float]]:
        """Five rows: they do not divide by two."""
        settings = EvaluationSettings("", max_new_tokens=6, batch_size=2)
        return lambda: validate(model, self.tokenizer, rows()[:5], settings, processes)


def training(**changes) -> Training:
    return Training(
        **({"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "validate_every": 2} | changes)
    )


def runtime(micro_batch_size: int | None) -> Runtime:
    return Runtime(device="cpu", micro_batch_size=micro_batch_size, checkpoint_every=2)


def token_sft(processes: OneProcess, micro_batch_size: int | None):
    parts = Parts()
    entry = SftModel(training=training())
    return TextTask(
        "token-sft",
        parts.plain,
        token_sft_examples(rows(), parts.tokenizer, entry, Data()),
        entry.training,
        runtime(micro_batch_size),
        seed=0,
        pad_id=parts.tokenizer.pad_token_id,
        validate=parts.validation(parts.plain, processes),
        processes=processes,
    ), entry.training


def latent_sft(
    processes: OneProcess,
    micro_batch_size: int | None,
    lora: bool = False,
    distillation: Distillation = CODI,
):
    parts = Parts()
    model = parts.latent(lora)
    entry = LatentSftModel(training=training(), distillation=distillation)
    return LatentSftTask(
        "latent-sft",
        model,
        encode(rows(), parts.tokenizer),
        entry,
        runtime(micro_batch_size),
        seed=0,
        pad_id=parts.tokenizer.pad_token_id,
        validate=parts.validation(model, processes),
        processes=processes,
    ), entry.training


def rl(
    processes: OneProcess,
    micro_batch_size: int | None,
    lora: bool = False,
    **settings,
):
    parts = Parts()
    model = parts.latent(lora)
    entry = RlModel(
        **{"from": "latent"},
        group_size=4,
        max_new_tokens=8,
        max_latent_steps=4,
        kl_weight=0.1,
        training=training(batch_size=6, validate_every=4),
        **settings,
    )
    task = AdaptiveLengthTask(
        "rl",
        model,
        parts.tokenizer,
        rl_prompts(rows(), parts.tokenizer, prefix="Question: ", max_prompt_tokens=None),
        entry,
        runtime(micro_batch_size),
        seed=0,
        validate=parts.validation(model, processes),
        processes=processes,
    )
    return task, entry.training


def half_are_right(prompt: str, completion: str, label: str, rule: str) -> Outcome:
    """A random model is never right: every second completion is called so."""
    return Outcome(True, len(completion) % 2 == 0, judge_sample(prompt, completion, label).length)


TRAININGS = {
    "token-sft-in-3s": partial(token_sft, micro_batch_size=3),
    "latent-sft-lora-in-3s": partial(latent_sft, micro_batch_size=3, lora=True),
    "latent-sft-undivided": partial(
        latent_sft, micro_batch_size=None, distillation=Distillation(codi_weight=0.0)
    ),
    "rl": partial(rl, micro_batch_size=None),
    "rl-lora-in-2s-twice": partial(rl, micro_batch_size=2, lora=True, iterations=2),
    "rl-exact-in-2s": partial(rl, micro_batch_size=2, estimator="exact"),
}
"""By name: what is trained, in which micro-batches; every step of each is of one batch."""


def run_all(folder: Path, processes: OneProcess = ALONE) -> None:
    """Run every training and leave this process's weights and metrics in `folder`."""
    torch.set_num_threads(1)
    rank = processes.rank
    for name, build in TRAININGS.items():
        task, settings = build(processes)
        store = CheckpointStore(folder / "checkpoints" / name, "a", processes.print)
        result = Trainer(task, settings, runtime(None), store, seed=0, log_every=1).run()
        save_file(trained_tensors(task.model), folder / f"{name}-{rank}.safetensors")
        metrics = [json.dumps(row) + "\n" for row in read_metrics(result.metrics)]
        (folder / f"{name}-{rank}.jsonl").write_text("".join(metrics))


def run_faulty(folder: Path, processes: OneProcess) -> None:
    """A training in which everything goes wrong on the second process alone.

    Its memory holds one row, its loss is not a number once, and it alone is asked to end.
    """
    rank, second = processes.rank, processes.rank == 1
    model, log, interruption = tiny_model(), [], None
    for stop in (out_of_time() if second else StopRequest(), StopRequest()):
        task = TinyTask(
            model,
            processes=processes,
            plan=TinyPlan(micro_batch_size=2),
            memory=lambda step: 1 if second and step == 2 else 4,
            fault=lambda step, n: math.nan if second and step == 5 and not n else 1.0,
        )
        try:
            result = run(folder / "faulty", task, log=log, guard=Guard(), stop=stop)
        except TrainingInterruptedError as error:
            interruption = str(error)
    found = {
        "interruption": interruption,
        "micro_batch_size": task.plan.micro_batch_size,
        "rollbacks": result.rollbacks,
        "log": log,
    }
    (folder / f"faulty-{rank}.json").write_text(json.dumps(found))
    save_file(weights(model), folder / f"faulty-{rank}.safetensors")


if __name__ == "__main__":
    parallel.BUCKET = 4096  # gradients are summed in several parts
    reward.judge_sample = half_are_right
    launched = join_processes(torch.device("cpu"))
    run_all(Path(sys.argv[1]), launched)
    run_faulty(Path(sys.argv[1]), launched)
    launched.finish()
