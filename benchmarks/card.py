"""The steps of a training on one device at a real model's size: seconds, memory, share of the peak.

    python -m benchmarks --device cuda --shape llama-1b [--micro-batch N] [--repetitions N]

The model has random weights, an adapter of rank 128 on all projections and batches of the paper's
size; rows have GSM8K's lengths. Steps hold forward, backward and the clipped AdamW update. The
naive path keeps float32 weights, so the two run one after the other, in the precision that `auto`
is on the device. Each figure is appended to `results/benchmarks/card.jsonl` as soon as it is
measured, and a figure that is there already is not measured again.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import naive
from benchmarks.inputs import Inputs, Shape, build_inputs
from benchmarks.measure import ATTENTION_ON_A_CPU, peak_memory_mib
from benchmarks.workloads import DISTILLATION
from latent_reasoning.config import LatentSftModel, Lora, RlModel, Runtime, Training
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.model.frozen import hold_frozen
from latent_reasoning.model.generation import generate
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.rl.task import AdaptiveLengthTask
from latent_reasoning.runtime.device import autocast, held_precision, resolve_precision, to_device
from latent_reasoning.runtime.memory import release
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.training.gradients import Backward, accumulate_gradients, backward_of
from latent_reasoning.training.optimiser import build_optimizer
from latent_reasoning.training.task import Task
from latent_reasoning.training.text import TextTask

REAL = Shape(rows=128, grpo_prompts=8, question=62)
"""Rows of the paper's batch with GSM8K's mean lengths, and its RL step: 8 prompts of 16 samples."""
SHAPES = {
    "llama-1b": replace(
        REAL,
        hidden_size=2048,
        intermediate_size=8192,
        layers=16,
        heads=32,
        key_value_heads=8,
        vocabulary=128_256,
    ),
    "smollm2": replace(
        REAL,
        hidden_size=576,
        intermediate_size=1536,
        layers=30,
        heads=9,
        key_value_heads=3,
        vocabulary=49_152,
    ),
    "h128": REAL,
    "tiny": replace(
        REAL,
        hidden_size=16,
        intermediate_size=16,
        layers=1,
        rows=4,
        question=10,
        grpo_prompts=2,
        group_size=2,
        rollout_tokens=6,
    ),
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Operations per second in bfloat16, dense, by a part of the card's name."""
PUBLISHED_STEPS = {"latent_sft": 30_000, "cot_sft": 30_000, "rl_step": 60_000}
NAIVE_ROWS = 32
"""Rows of a micro-batch of the naive path, as published."""
PATHS = ("naive", "eager", "captured", "compiled")
"""The last is the captured one with `runtime.compile`, which takes minutes to compile."""
DECODED = (8, 40)
"""A decoded token's time is the difference of these two lengths over their difference."""


@dataclass(frozen=True)
class Part:
    """A figure to be measured: what is run, and how many tokens a run reads.

    `shapes` counts what has been captured so far.
    """

    name: str
    path: str
    run: Callable[[int], object]
    tokens: int
    shapes: Callable[[], int] = lambda: 0


class Card:
    """A device, a shape and the parts that are measured there."""

    def __init__(
        self, shape: str, device: torch.device, micro_batch: int | None, paths: Sequence[str]
    ) -> None:
        self.shape, self.device = SHAPES[shape], device
        self.micro_batch = min(micro_batch or self.shape.rows, self.shape.rows)
        self.precision = resolve_precision("auto", device)
        self.paths = paths
        self.operations: dict[str, int] = {}
        self.inputs = self._inputs()
        training = Training(steps=1, batch_size=self.shape.rows)
        self.optimizer = build_optimizer(self.inputs.model, training)

    def wants(self, path: str) -> bool:
        """Whether a path is to be measured: one of `PATHS`."""
        return path in self.paths

    def _inputs(self) -> Inputs:
        inputs = build_inputs(self.shape)
        inputs.model.to(self.device)
        attach_lora(inputs.model, Lora(r=min(128, self.shape.hidden_size), alpha=32, dropout=0.1))
        inputs.model.train()
        return inputs

    def parts(self) -> Iterator[Part]:
        """The parts in order; the weights are held as training does from the second one on."""
        model, rows = self.inputs.model, self.inputs.sft
        texts = sum(len(row.teacher) + len(row.student) for row in rows)
        if self.wants("naive"):
            yield Part("latent_sft", "naive", self._naive_step, texts)
        hold_frozen(model, held_precision("auto", self.device))
        for path in PATHS[1:]:
            if not self.wants(path):
                continue
            graphs: Literal["auto", "off"] = "off" if path == "eager" else "auto"
            runtime = Runtime(
                device=self.device.type,
                micro_batch_size=self.micro_batch,
                cuda_graphs=graphs,
                compile=path == "compiled",
            )
            model.sizes, model.captured.when = None, graphs
            for name, task, tokens in self._tasks(runtime, texts):
                backward = backward_of(task, runtime, print)
                shapes = getattr(backward, "shapes", lambda: 0)
                yield Part(name, path, self._step_of(task, backward), tokens, shapes)
                backward.forget()
                release()
            for tokens in DECODED:
                yield Part(f"decode_{tokens}", path, self._decoding(tokens), 0)

    def _tasks(self, runtime: Runtime, texts: int) -> Iterator[tuple[str, Task, int]]:
        """What is trained, and how many tokens a step of it reads."""
        model, rows = self.inputs.model, self.inputs.sft
        training = Training(steps=1, batch_size=len(rows), accumulation="tokens")
        common = {"seed": 0, "pad_id": self.inputs.tokenizer.eos_token_id, "validate": dict}
        entry = LatentSftModel(distillation=DISTILLATION, training=training)
        yield "latent_sft", LatentSftTask("latent", model, rows, entry, runtime, **common), texts
        teachers = [row.teacher for row in rows]
        text = TextTask("cot", model, teachers, training, runtime, **common)
        yield "cot_sft", text, sum(map(len, teachers))
        prompts, size = self.inputs.grpo, self.shape.group_size
        policy = RlModel(
            **{"from": "latent"},
            group_size=size,
            max_new_tokens=self.shape.rollout_tokens,
            max_latent_steps=self.shape.steps,
            training=Training(steps=1, batch_size=len(prompts)),
        )
        rl = AdaptiveLengthTask(
            "rl",
            model,
            self.inputs.tokenizer,
            prompts,
            policy,
            runtime.model_copy(update={"micro_batch_size": None}),
            seed=0,
            validate=dict,
        )
        samples = size * sum(len(prompt.ids) + self.shape.rollout_tokens for prompt in prompts)
        yield "rl_step", rl, samples

    def _step_of(self, task: Task, backward: Backward) -> Callable[[int], None]:
        def step(repetition: int) -> None:
            task.model.train()
            backward.zero_gradients()
            with autocast(self.device, self.precision):
                accumulate_gradients(task.model, task, repetition, 2.0, backward)
            self.optimizer.step()

        return step

    def _naive_step(self, _: int) -> None:
        model, rows = self.inputs.model, self.inputs.sft
        self.optimizer.zero_grad()
        for first in range(0, len(rows), NAIVE_ROWS):
            batch = collate_latent(rows[first : first + NAIVE_ROWS], 1)
            with autocast(self.device, self.precision):
                batch = to_device(batch, self.device)
                naive.latent_sft_loss(model, batch, DISTILLATION).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        self.optimizer.step()

    def _decoding(self, tokens: int) -> Callable[[int], object]:
        def decode(_: int) -> object:
            self.inputs.model.eval()
            with autocast(self.device, self.precision):
                return generate(
                    self.inputs.model,
                    self.inputs.prompts,
                    max_new_tokens=tokens,
                    eos_id=self.inputs.model.settings.end_id,  # never predicted: no row ends
                    batch_size=self.shape.rows,
                )

        return decode

    def measure(self, part: Part, repetitions: int) -> dict[str, object]:
        """One warm-up with its operations counted, then timed runs.

        A captured program is taken to do the operations of the eager one: padding is not work.
        """
        if part.path in ("captured", "compiled"):
            part.run(0)
            operations = self.operations.get(part.name)
        else:
            with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_A_CPU) as counter:
                part.run(0)
            operations = counter.get_total_flops()
            if part.path == "eager":
                self.operations[part.name] = operations
        part.run(1)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for repetition in range(2, repetitions + 2):
            self._finish()
            start = time.perf_counter()
            part.run(repetition)
            self._finish()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        peak = next((rate for name, rate in PEAKS.items() if name in self.name), None)
        steps = PUBLISHED_STEPS.get(part.name)
        return {
            "seconds": median,
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "tokens_per_second": part.tokens / median,
            "tflop": None if operations is None else operations / 1e12,
            "share_of_peak": peak and operations and operations / median / peak,
            "peak_gib": self._peak_gib(),
            "graphs": part.shapes(),
            "published_hours": None if steps is None else steps * median / 3600,
        }

    @property
    def name(self) -> str:
        """The card's name."""
        return torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return peak_memory_mib() / 1024


def measure_card(
    shape: str,
    device: torch.device,
    micro_batch: int | None,
    repetitions: int,
    file: Path,
    paths: Sequence[str],
) -> None:
    """Measure what `file` lacks of a shape on a device, and append it part by part."""
    card = Card(shape, device, micro_batch, paths)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = [json.loads(line) for line in lines]
    eager = (line for line in done if (line["shape"], line["path"]) == (shape, "eager"))
    counted = {line["part"]: line["tflop"] for line in eager}
    card.operations |= {part: int(tflop * 1e12) for part, tflop in counted.items() if tflop}
    for part in card.parts():
        key = {
            "shape": shape,
            "device": card.name,
            "torch": torch.__version__,
            "precision": str(card.precision).removeprefix("torch."),
            "part": part.name,
            "path": part.path,
            "micro_batch": NAIVE_ROWS if part.path == "naive" else card.micro_batch,
        }
        if not any(key.items() <= line.items() for line in done):
            measured = card.measure(part, repetitions)
            done.append(key | measured)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(done[-1]) + "\n")
        print(next(line for line in done if key.items() <= line.items()), flush=True)
    own = [line for line in done if line["shape"] == shape]
    for path in paths:
        times = {line["part"]: line["seconds"] for line in own if line["path"] == path}
        short, long = (times.get(f"decode_{tokens}") for tokens in DECODED)
        if short and long:
            print(f"{path}: a decoded token of {card.shape.rows} rows: ", end="")
            print(f"{1000 * (long - short) / (DECODED[1] - DECODED[0]):.2f} ms")
