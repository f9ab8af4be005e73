"""States of the chain at every block, and what can be learned of them: probes (D), signals (H).

The stream after every block, before the final norm (the last but one entry is the last block's, the
last is the final norm's), at START and at each latent that a row makes.

N rows, J the most steps, S = L + 2 states, d hidden size.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import pandas
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from latent_reasoning.inside.capture import States
from latent_reasoning.inside.reasoning import Reasoning
from latent_reasoning.inside.sequences import Batch, Place
from latent_reasoning.inside.statistics import auc, by_operations, share

RIDGE = 1.0
"""Weight of the probes' penalty, on standardised states."""
FEWEST = 20
"""Rows that a probe is trained and tested on, at least."""
SEED = 0
EXACT_NUMBERS = 2**26
"""States of more numbers than these (256 MiB) are kept in half precision."""


@dataclass
class Chain:
    """An observer that keeps `latents` (N, J + 1, S, d) and the question's last token (N, S, d)."""

    latents: Tensor
    question: Tensor

    @classmethod
    def empty(cls, reasoning: Reasoning, blocks: int) -> Chain:
        rows, _, hidden = reasoning.hidden.shape
        shape = (rows, int(reasoning.steps.max()) + 1, blocks + 2, hidden)
        kept = torch.float32 if math.prod(shape) < EXACT_NUMBERS else torch.float16
        return cls(torch.zeros(shape, dtype=kept), torch.zeros(rows, *shape[2:], dtype=kept))

    def add(self, batch: Batch, states: States) -> None:
        """Keep the states of a batch."""
        every = torch.stack([*states.stream, states.final], 2)
        row, column = (batch.step >= 0).nonzero(as_tuple=True)
        places = batch.rows[row.cpu()], batch.step[row, column].cpu()
        self.latents[places] = every[row, column].cpu().to(self.latents)
        start = (batch.places == Place.START).int().argmax(1)
        before = every[torch.arange(len(start)), (start - 1).clamp(min=0)]
        self.question[batch.rows] = before.cpu().to(self.question)


# ------------------------------------------------------------------------------- D. probes


def probe(train: tuple[Reasoning, Chain], test: tuple[Reasoning, Chain]) -> pandas.DataFrame:
    """Ridge probes of v_m from h_j at each block, trained on other rows than they are tested on.

    `value, step, block` (-1: the embedding, L: the final norm), `source`: latent, or the controls
    question (its last token) and shuffled (labels of other rows); `n, correct, accuracy, low, high`
    and `majority`, the share of the commonest value.
    """
    lines = []
    most = min(max(map(len, r.equations), default=0) for r, _ in (train, test))
    steps = min(chain.latents.shape[1] for _, chain in (train, test))
    for m, step in itertools.product(range(1, most + 1), range(steps)):
        known = [_known(*pair, m, step) for pair in (train, test)]
        if min(len(rows.labels) for rows in known) < FEWEST:
            continue
        labels, expected = (rows.labels for rows in known)
        shuffled = numpy.random.default_rng(SEED).permutation(labels)
        majority = max(numpy.mean(expected == value) for value in set(expected))
        for block in range(train[1].latents.shape[2]):
            latents = [rows.latents[:, block].float().numpy() for rows in known]
            found = {"latent": _read(latents, labels), "shuffled": _read(latents, shuffled)}
            if step == 0:
                questions = [rows.questions[:, block].float().numpy() for rows in known]
                found["question"] = _read(questions, labels)
            for source, read in found.items():
                line = {"value": m, "step": step, "block": block - 1, "source": source}
                lines.append(line | share(read == expected) | {"majority": majority})
    columns = ["value", "step", "block", "source", "n", "accuracy"]
    return pandas.DataFrame(lines, columns=None if lines else columns)


class _Known(NamedTuple):
    """The n rows that have v_m and take a step: their states there and at the question's last
    token, (n, S, d), and v_m as a label."""

    latents: Tensor
    questions: Tensor
    labels: NDArray


def _known(reasoning: Reasoning, chain: Chain, m: int, step: int) -> _Known:
    known = (reasoning.operations >= m) & (reasoning.steps >= step)
    rows = known.nonzero()[:, 0]
    labels = numpy.array([str(reasoning.equations[i][m - 1].value) for i in rows.tolist()])
    return _Known(chain.latents[rows, step], chain.question[rows], labels)


def _read(states: list[NDArray], labels: NDArray) -> NDArray:
    """The labels of `states[1]` by a probe of `states[0]`, whose `labels` are known."""
    fitted = make_pipeline(StandardScaler(), RidgeClassifier(alpha=RIDGE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # states that are the same everywhere
        return fitted.fit(states[0], labels).predict(states[1])


# ------------------------------------------------------------------------------ H. signals


def trajectory_signals(reasoning: Reasoning, chain: Chain) -> pandas.DataFrame:
    """Signals of each row that takes a step: `net_*` |h_n - h_0|, `accumulated_*` sum |h_j+1 - h_j|
    and `alignment_*`, the mean cosine of each change with h_n - h_0; over blocks (`_mean`) and at
    the last one (`_last`); `log_probability` of the answer, `p_stop`, `operations`, `correct`."""
    own, rows = reasoning.own, []
    for i, n in enumerate(reasoning.steps.tolist()):
        if not n:
            continue
        states = chain.latents[i, : n + 1, 1:-1].float()
        changes, net = states[1:] - states[:-1], states[-1] - states[0]
        per_block = {
            "net": net.norm(dim=-1),
            "accumulated": changes.norm(dim=-1).sum(0),
            "alignment": torch.cosine_similarity(changes, net[None], dim=-1).mean(0),
        }
        line = {"row": i, "operations": len(reasoning.equations[i]), "steps": n}
        for name, value in per_block.items():
            line |= {f"{name}_mean": float(value.mean()), f"{name}_last": float(value[-1])}
        line["log_probability"] = own["log_probability"][i]
        line |= {"p_stop": float(reasoning.stops[i, n]), "correct": bool(own["correct"][i])}
        rows.append(line)
    return pandas.DataFrame(rows)


def signal_areas(signals: pandas.DataFrame) -> pandas.DataFrame:
    """How well each signal predicts a right answer: `signal, operations` (0: all rows), `n, wrong,
    auc, low, high`."""
    names = [c for c in signals if c not in ("row", "operations", "steps", "correct")]
    lines = []
    for k, group in by_operations(signals) if names else ():
        for name in names:
            area, low, high = auc(group[name], group["correct"])
            line = {"signal": name, "operations": k, "n": len(group)}
            line |= {"wrong": int((~group["correct"]).sum()), "auc": area}
            lines.append(line | {"low": low, "high": high})
    columns = ["signal", "operations", "n", "wrong", "auc", "low", "high"]
    return pandas.DataFrame(lines, columns=columns)
