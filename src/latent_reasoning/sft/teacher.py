"""A frozen teacher for latent SFT: its hidden states, computed once, and its own traces.

By default latent SFT is self-distillation and none of this is used. With `distillation.teacher` the
states of a frozen chain-of-thought model are the targets. They do not change, so they are computed
once, over all rows, and kept in a file beside the checkpoints. With `traces: teacher` the teacher
also writes the reasoning itself; only traces that lead to the right answer are kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, Distillation, NumberRule
from latent_reasoning.data.answers import judge, split_completion
from latent_reasoning.data.collation import bucket_by_length, collate_plain
from latent_reasoning.data.context import decode
from latent_reasoning.data.examples import PlainExample
from latent_reasoning.data.rows import DataError, Row, read_rows, row_lines
from latent_reasoning.data.sequences import encode_prompts
from latent_reasoning.model.generation import generate
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.files import atomic_file, write_text_atomically
from latent_reasoning.sft.distillation import Side, StateSummary, read_with_states

STATES_FILE = "teacher-states.npy"
TRACES_FILE = "teacher-traces.jsonl"
EQUATION = re.compile(r"<<.*?>>")
SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s|$)|$)", re.MULTILINE)


@dataclass(frozen=True)
class TeacherStates:
    """Target and mean states of all examples, float32 `(examples, 2, L, d)`, on disk."""

    states: np.ndarray
    reasons: np.ndarray

    def at(self, indices: Sequence[int]) -> StateSummary:
        """The states of some examples, on the host."""
        states = torch.from_numpy(np.ascontiguousarray(self.states[list(indices)]))
        target, mean = states.permute(1, 2, 0, 3)
        return StateSummary(target, mean, torch.from_numpy(self.reasons[list(indices)]))


def teacher_states(
    teacher: LatentReasoner,
    student: LatentReasoner,
    examples: Sequence[PlainExample],
    distillation: Distillation,
    *,
    folder: Path,
    pad_id: int,
    batch_size: int,
) -> TeacherStates:
    """The teacher's states of all examples: computed, or read from `folder` if they are there.

    `folder` belongs to one configuration, so a file in it was made by this teacher from these rows.
    Raises `ConfigError` where teacher and student differ in their blocks or hidden size.
    """
    shapes = {
        (model.base.config.num_hidden_layers, model.base.config.hidden_size)
        for model in (teacher, student)
    }
    if len(shapes) > 1:
        raise ConfigError(
            f"distillation.teacher: {distillation.teacher} differs from the student in blocks or "
            f"hidden size ({sorted(shapes)}): both have to come from the same base"
        )
    file = folder / STATES_FILE
    if not file.exists():
        _write_states(teacher, examples, distillation, file, pad_id, batch_size)
    reasons = np.array([example.reasoning_length > 0 for example in examples])
    return TeacherStates(np.load(file, mmap_mode="r"), reasons)


@torch.no_grad()
def _write_states(
    teacher: LatentReasoner,
    examples: Sequence[PlainExample],
    distillation: Distillation,
    file: Path,
    pad_id: int,
    batch_size: int,
) -> None:
    teacher.eval()
    with atomic_file(file) as temporary:
        states = None
        for indices in bucket_by_length([len(example) for example in examples], batch_size):
            batch = collate_plain([examples[index] for index in indices], pad_id)
            side = to_device(Side.plan(teacher, batch, "teacher", distillation), teacher.device)
            _, summary = read_with_states(teacher, side, distillation)
            both = torch.stack([summary.target, summary.mean]).permute(2, 0, 1, 3)
            if states is None:
                shape = (len(examples), *both.shape[1:])
                states = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            states[indices] = both.float().cpu().numpy()
        states.flush()


def teacher_traces(
    teacher: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    folder: Path,
    prefix: str,
    max_new_tokens: int,
    batch_size: int,
    number_rule: NumberRule = "exact",
) -> list[Row]:
    """The rows that the teacher answers right, with its own greedy reasoning as their steps.

    They are written once, to `folder`. Raises `DataError` where the teacher answers no row right.
    """
    file = folder / TRACES_FILE
    if not file.exists():
        prompts = encode_prompts(rows, tokenizer, prefix=prefix, latent=False)
        generations = generate(
            teacher,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_token_id,
            batch_size=batch_size,
        )
        texts = (decode(tokenizer, generation.ids) for generation in generations)
        kept = [
            replace(row, steps=trace_steps(split_completion(text)[0]))
            for row, text in zip(rows, texts, strict=True)
            if judge(row.answer, text, "text", number_rule).correct
        ]
        if not kept:
            raise DataError(
                f"the teacher answers none of {len(rows)} rows right: no traces to learn from; "
                "use distillation.traces: data"
            )
        write_text_atomically(file, "".join(row_lines(kept)))
    return read_rows(file)


def trace_steps(reasoning: str) -> tuple[str, ...]:
    """The steps of a generated trace: its equations `<<..>>`, or its sentences if it has none; a
    line's end is a sentence's."""
    return tuple((EQUATION if "<<" in reasoning else SENTENCE).findall(reasoning))
