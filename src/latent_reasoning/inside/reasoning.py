"""What a latent model does on rows when nothing is touched: states, stop decisions, answers.

All analyses of latent steps start from here. Answers are read after STOP and ` The answer is:`, as
in the evaluation at forced n, so that they differ in their latent steps alone.

N rows, J the most steps that are taken, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import NumberRule, UserError
from latent_reasoning.data.answers import judge
from latent_reasoning.data.context import decode, read_pieces
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_prompts
from latent_reasoning.inside.equations import Equation, read_equations
from latent_reasoning.inside.walk import Answers, Walk
from latent_reasoning.model.reasoner import LatentReasoner


@dataclass(frozen=True)
class Subject:
    """A model under study and how it is spoken to; `batch` is the number of rows at once."""

    model: LatentReasoner
    tokenizer: PreTrainedTokenizerBase
    prefix: str = ""
    rule: NumberRule = "exact"
    batch: int = 64

    def ending(self) -> list[int]:
        """STOP and ` The answer is:`."""
        prompt, whole = (
            encode_prompts(
                [Row("", "a", None, "0")],
                self.tokenizer,
                prefix=self.prefix,
                latent=True,
                forced_steps=steps,
                suffix=self.model.settings.suffix,
                announcement=self.model.settings.answer_text,
            )[0]
            for steps in (None, 0)
        )
        return whole[len(prompt) :]

    def value_tokens(self, values: Sequence[str]) -> list[int]:
        """The first token of each value as it stands in a text, after a space; -1: none."""
        tokens = []
        for ids in read_pieces(self.tokenizer, [f" {value}" for value in values]):
            texts = [decode(self.tokenizer, [index]).strip() for index in ids]
            tokens.append(next((i for i, text in zip(ids, texts, strict=True) if text), -1))
        return tokens


@dataclass
class Reasoning:
    """N rows and their untouched reasoning; `steps` (N,) is the number at which each stops itself.

    `hidden` (N, J + 1, d) holds h_j, `inputs` (N, J, d) holds z_j, `stops` (N, J + 1) the
    probability of STOP, all up to the same J. `forced` has a row for each row and number of steps:
    `row, steps, answer` (None: no number), `correct, log_probability`; `ids` are the answers'.
    """

    rows: list[Row]
    equations: list[tuple[Equation, ...]]
    prompts: list[list[int]]
    steps: Tensor
    hidden: Tensor
    inputs: Tensor
    stops: Tensor
    forced: pandas.DataFrame
    ids: list[list[list[int]]]

    @property
    def operations(self) -> Tensor:
        """K, the number of equations of each row, (N,)."""
        return torch.tensor([len(equations) for equations in self.equations])

    @property
    def own(self) -> pandas.DataFrame:
        """`forced` at the number of steps at which each row stops by itself, a line a row."""
        steps = self.steps.numpy()
        chosen = self.forced["steps"].to_numpy() == steps[self.forced["row"].to_numpy()]
        return self.forced[chosen].reset_index(drop=True)


def read_reasoning(
    subject: Subject, rows: Sequence[Row], most: int, forced_steps: int | None = None
) -> Reasoning:
    """Take `most` latent steps with every row, and answer after each number of steps.

    A row stops where greedy decoding does, at the model's own bound, or at `most`; with
    `forced_steps`, always there. Raises `UserError` for a model that samples its latent inputs.
    """
    model, bound = subject.model, subject.model.settings.max_latent_steps
    if model.settings.latent_noise:
        raise UserError(
            f"this model samples its latent inputs (latent_noise: {model.settings.latent_noise} in "
            "latent.json), and its chains are read without noise here; look into it with 0"
        )
    most = max(most, forced_steps or 0)
    rows = list(rows)
    prompts = encode_prompts(
        rows, subject.tokenizer, prefix=subject.prefix, latent=True, suffix=model.settings.suffix
    )
    ending, parts, frames, ids = subject.ending(), [], [], []
    for batch in batches(len(rows), subject.batch):
        walk = Walk.begin(model, [prompts[i] for i in batch]).run(most)
        count = len(batch)
        of = torch.arange(count, device=model.device).repeat_interleave(most + 1)
        steps = torch.arange(most + 1, device=model.device).repeat(count)
        answers = walk.answers(of, steps, ending, subject.tokenizer.eos_token_id)
        frames.append(judged(subject, rows, batch.start + of.cpu(), steps.cpu(), answers))
        ids += [answers.ids[i : i + most + 1] for i in range(0, len(of), most + 1)]
        hidden = torch.stack(walk.hidden, 1)
        inputs = torch.stack(walk.inputs, 1) if most else hidden[:, :0]
        parts.append([x.cpu() for x in (hidden, inputs, walk.stop_probabilities(), walk.stops())])
    hidden, inputs, stops, stopped = (torch.cat(part) for part in zip(*parts, strict=True))
    stopped[:, most if bound is None else min(most, bound)] = True
    steps = stopped.int().argmax(1)
    if forced_steps is not None:
        steps = torch.full_like(steps, forced_steps)
    equations = [read_equations(row) for row in rows]
    forced = pandas.concat(frames, ignore_index=True)
    return Reasoning(rows, equations, prompts, steps, hidden, inputs, stops, forced, ids)


def judged(
    subject: Subject, rows: Sequence[Row], of: Tensor, steps: Tensor, answers: Answers
) -> pandas.DataFrame:
    """`row, steps, answer, correct, log_probability` of answers to `rows[of[i]]`."""
    pairs = [(rows[i].answer, tuple(ids)) for i, ids in zip(of.tolist(), answers.ids, strict=True)]
    verdicts = {  # most answers are alike
        (label, ids): judge(label, decode(subject.tokenizer, list(ids)), "forced", subject.rule)
        for label, ids in set(pairs)
    }
    return pandas.DataFrame(
        {
            "row": of.numpy(),
            "steps": steps.numpy(),
            "answer": [verdicts[pair].extracted for pair in pairs],
            "correct": [verdicts[pair].correct for pair in pairs],
            "log_probability": answers.log_probability.numpy(),
        }
    )


def batches(count: int, size: int) -> Iterator[range]:
    """The places 0 .. count - 1 in runs of at most `size`."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
