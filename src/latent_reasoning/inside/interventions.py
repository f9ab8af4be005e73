"""B. Interventions: what becomes of the answer if a step reads something else.

At step j alone (the steps after it are the model's own again), or at all steps, the input z_j is
replaced by: zero; its mean over rows; noise of the same norm; another of the row's own inputs; the
input of another row with as many equations (the donor). Rows keep their own number of steps.

On chains, the donor's value v_m implies a counterfactual answer. The share of rows that now give
exactly this answer, against the share expected by chance, is the causal test of whether the latent
carries v_m.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy
import pandas
import torch
from torch import Tensor

from latent_reasoning.data.numbers import equal, read_number
from latent_reasoning.inside.equations import Equation, counterfactual, is_chain
from latent_reasoning.inside.lens import ROLES
from latent_reasoning.inside.reasoning import Reasoning, Subject, batches, judged
from latent_reasoning.inside.statistics import difference, paired, share
from latent_reasoning.inside.walk import Walk

SEED = 0
CANDIDATES = 30
"""Rows that are looked at for a donor: the one with the most other answers is taken."""
ALL_STEPS = 0
"""Stands for all steps where a single step has its number from 1."""


@dataclass(frozen=True)
class Donors:
    """For each row another one, `rows` (N,) (-1: none), and the answers that its values imply.

    `answers[i][m - 1]` is the answer of row i if v_m were the donor's; None where the row is no
    chain, where it cannot be computed, or where it is the row's own answer.
    """

    rows: Tensor
    answers: list[list[Fraction | None]]


def choose_donors(reasoning: Reasoning) -> Donors:
    """A donor with as many equations and at least as many steps, whose values imply others."""
    generator = numpy.random.default_rng(SEED)
    chosen, implied = [], []
    operations, steps = reasoning.operations, reasoning.steps
    for i, equations in enumerate(reasoning.equations):
        fits = (operations == operations[i]) & (steps >= steps[i])
        fits[i] = False
        pool = fits.nonzero()[:, 0].numpy()
        options = generator.permutation(pool)[: CANDIDATES if is_chain(equations) else 1]
        best: tuple[int, list[Fraction | None]] = (-1, [])
        for donor in map(int, options):
            answers = _implied(equations, reasoning.equations[donor])
            if best[0] < 0 or answers.count(None) < best[1].count(None):
                best = (donor, answers)
            if None not in answers:
                break
        chosen.append(best[0])
        implied.append(best[1])
    return Donors(torch.tensor(chosen), implied)


def _implied(own: Sequence[Equation], other: Sequence[Equation]) -> list[Fraction | None]:
    if not is_chain(own):
        return [None] * len(own)
    answers = [counterfactual(own, m, e.value) for m, e in enumerate(other, 1)]
    return [None if answer == own[-1].value else answer for answer in answers]


def replacements(reasoning: Reasoning, donors: Donors) -> dict[str, Tensor]:
    """What each kind of intervention puts in the place of z_1 .. z_J, each (N, J, d)."""
    inputs, steps = reasoning.inputs, reasoning.steps
    taken = (torch.arange(inputs.shape[1]) < steps[:, None]).unsqueeze(-1)
    mean = (inputs * taken).sum(0) / taken.sum(0).clamp(min=1)
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(SEED)).to(inputs)
    noise = noise / noise.norm(dim=-1, keepdim=True) * inputs.norm(dim=-1, keepdim=True)
    after = (torch.arange(inputs.shape[1]) + 1) % steps[:, None].clamp(min=1)
    return {
        "zero": torch.zeros_like(inputs),
        "mean": mean.expand_as(inputs),
        "noise": noise,
        "order": inputs.gather(1, after.unsqueeze(-1).expand_as(inputs)),
        "donor": inputs[donors.rows],
    }


def intervene(subject: Subject, reasoning: Reasoning, donors: Donors) -> pandas.DataFrame:
    """The answer of every row under each intervention that concerns it.

    `kind, step` (0: all), `row, steps, answer, correct, log_probability, untouched` (whether its
    own answer was right).
    """
    by_kind, most = replacements(reasoning, donors), int(reasoning.steps.max())
    frames = []
    for batch in batches(len(reasoning.rows), subject.batch):
        rows = torch.tensor(batch)
        walk = Walk.begin(subject.model, [reasoning.prompts[i] for i in batch])
        for step in range(ALL_STEPS, most + 1):
            walk.run(max(step, 1) - 1)  # what comes before the step is the same for all kinds
            for kind, replaced in by_kind.items():
                concerned = reasoning.steps[rows] >= max(step, 2 if kind == "order" else 1)
                if kind == "donor":
                    concerned &= donors.rows[rows] >= 0
                if not concerned.any():
                    continue
                changed = walk.fork().run(most, _change(step, replaced[rows]))
                frame = _answers(subject, reasoning, changed, rows, concerned)
                frames.append(frame.assign(kind=kind, step=step))
    columns = ["kind", "step", "row", "steps", "answer", "correct", "log_probability"]
    table = pandas.concat(frames) if frames else pandas.DataFrame(columns=columns)
    untouched = reasoning.own["correct"].to_numpy()
    table["untouched"] = untouched[table["row"].to_numpy(dtype=int)]
    return table.sort_values(["kind", "step", "row"], ignore_index=True)


def _change(step: int, replaced: Tensor) -> Callable[[int, Tensor], Tensor]:
    def change(j: int, inputs: Tensor) -> Tensor:
        return replaced[:, j - 1].to(inputs) if step in (ALL_STEPS, j) else inputs

    return change


def _answers(
    subject: Subject, reasoning: Reasoning, walk: Walk, rows: Tensor, concerned: Tensor
) -> pandas.DataFrame:
    """What the concerned rows of a batch answer after their own number of steps."""
    places = concerned.nonzero()[:, 0]
    steps, device = reasoning.steps[rows[places]], subject.model.device
    ending, eos_id = subject.ending(), subject.tokenizer.eos_token_id
    answers = walk.answers(places.to(device), steps.to(device), ending, eos_id)
    return judged(subject, reasoning.rows, rows[places], steps, answers)


def effects(table: pandas.DataFrame) -> pandas.DataFrame:
    """Accuracy under each intervention against the same rows untouched: shares, paired difference,
    McNemar's p."""
    lines = []
    for (kind, step), group in table.groupby(["kind", "step"], sort=True):
        line = {"kind": kind, "step": step, **share(group["correct"])}
        line["untouched"] = group["untouched"].mean()
        lines.append(line | paired(group["correct"], group["untouched"]))
    columns = ["kind", "step", "accuracy", "untouched"]
    return pandas.DataFrame(lines, columns=None if lines else columns)


def counterfactual_shares(table: pandas.DataFrame, donors: Donors) -> pandas.DataFrame:
    """How often the donor's latent at a step makes exactly the answer that its v_m implies.

    `step, role` (as in `lens`), `value, n, correct, accuracy, low, high`; `chance`, the share among
    the other rows' answers of the same cell, and the paired `difference` from it with its interval;
    `kept`, the share that still gives the right answer. Only rows whose implied answer is not their
    own count.
    """
    swapped, lines = table[table["kind"] == "donor"], []
    most = max(map(len, donors.answers), default=0)
    for step, group in swapped.groupby("step"):
        operations = numpy.array([len(donors.answers[i]) for i in group["row"]])
        for m, (role, fits) in itertools.product(range(1, most + 1), ROLES.items()):
            of_role = group[fits(operations, m)]
            implied = [donors.answers[i][m - 1] for i in of_role["row"]]
            cell = of_role[[answer is not None for answer in implied]]
            wanted = [answer for answer in implied if answer is not None]
            if len(cell) < 2:
                continue
            hits, chance = hits_and_chance(cell["answer"].tolist(), wanted)
            line = {"step": step, "role": role, "value": m, **share(hits), "chance": chance.mean()}
            line |= difference(hits - chance) | {"kept": cell["correct"].mean()}
            lines.append(line)
    return pandas.DataFrame(lines, columns=None if lines else ["step", "role", "value", "n"])


def hits_and_chance(
    given: Sequence[str | None], wanted: Sequence[Fraction]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """For each row whether its answer is the wanted one, and the share of other rows' that are."""
    values = set(wanted)
    matches = {text: _matching(text, values) for text in set(given)}
    hits = numpy.array([w in matches[text] for text, w in zip(given, wanted, strict=True)], float)
    counts = {w: sum(w in matches[text] for text in given) for w in values}
    every = numpy.array([counts[w] for w in wanted], float)
    return hits, (every - hits) / max(1, len(given) - 1)


def _matching(text: str | None, values: set[Fraction]) -> set[Fraction]:
    """The values that an answer equals, as the evaluation compares numbers."""
    number = read_number(text) if isinstance(text, str) else None  # pandas makes nan of None
    return set() if number is None else {value for value in values if equal(value, number)}
