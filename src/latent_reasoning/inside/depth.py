"""F. Use of depth, after *Do language models use their depth efficiently?*; G. attention mass.

With a and m the outputs of attention and MLP of a block, h the stream before it and h' = h + a.
Every number is first averaged over the positions of a row, then over rows, with an interval.

B rows, T columns, L blocks, M numbers a position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas
import torch
from torch import Tensor

from latent_reasoning.inside.capture import (
    Anatomy,
    States,
    attention_weights,
    capture,
    captured,
    read,
    replayed,
    skipped,
)
from latent_reasoning.inside.reasoning import Subject
from latent_reasoning.inside.sequences import Batch, Place, Text, batched
from latent_reasoning.inside.statistics import mean_intervals
from latent_reasoning.model.passes import Kind

GROUPS = {
    "text": (Place.QUESTION, Place.START),
    "latent": (Place.LATENT,),
    "answer": (Place.ANSWER,),
}
"""Positions that are looked at apart."""
LENS_POSITIONS = 16
"""Positions of a group that a row's lens by layer reads, at most: the last ones."""
TOP = 5
FEWEST = 5
"""Rows of one K that are shown apart, at least."""

Label = dict[str, object]


def groups_of(batch: Batch) -> dict[str, Tensor]:
    """The columns (B, T) of each group."""
    return {
        name: torch.stack([batch.places == place for place in places]).any(0)
        for name, places in GROUPS.items()
    }


@dataclass
class RowMeans:
    """Numbers of positions, averaged over those of each row, and then over rows."""

    kept: dict[tuple, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(
        self, batch: Batch, columns: dict[tuple, Tensor], labels: Sequence[Label], values: Tensor
    ) -> None:
        """Add `values` (M, B, T), described by M `labels`, at the `columns` (B, T) of each group:
        a group's key is the items of its own label."""
        names = tuple(tuple(label.items()) for label in labels)
        for group, mask in columns.items():
            count = mask.sum(1)
            means = values.masked_fill(~mask, 0).sum(-1)[:, count > 0] / count[count > 0]
            rows = batch.operations[(count > 0).cpu()]
            if len(rows):
                self.kept.setdefault((group, names), []).append((rows, means.double().cpu()))

    def table(self) -> pandas.DataFrame:
        """A line a label and group, with `operations` (0: all rows; K apart where several occur, in
        `FEWEST` rows at least), `n, mean, low, high`."""
        parts = {
            key: [torch.cat(x, -1) for x in zip(*p, strict=True)] for key, p in self.kept.items()
        }
        every = {k for rows, _ in parts.values() for k in rows.tolist()}
        lines: list[Label] = []
        for (group, names), (rows, means) in parts.items():
            for k in [0, *sorted(every)] if len(every) > 1 else [0]:
                chosen = means if k == 0 else means[:, rows == k]
                count = chosen.shape[1]
                if k and count < FEWEST:
                    continue
                intervals = mean_intervals(chosen.numpy().T).T.tolist()
                for name, (mean, low, high) in zip(names, intervals, strict=True):
                    line = dict(group + name) | {"operations": k, "n": count}
                    lines.append(line | {"mean": mean, "low": low, "high": high})
        return pandas.DataFrame(lines, columns=None if lines else [*COLUMNS])


COLUMNS = ("group", "source", "head", "where", "block", "operations", "n", "mean", "low", "high")
"""Of a table without lines."""


def _grouped(batch: Batch, within: Tensor, **label: object) -> dict[tuple, Tensor]:
    """The columns of each group that lie `within` (B, T), by the group's label."""
    return {
        (*label.items(), ("group", name)): mask & within for name, mask in groups_of(batch).items()
    }


@dataclass
class Depth:
    """An observer of norms, contributions, cosines and the lens by layer (for `lens_rows`)."""

    subject: Subject
    anatomy: Anatomy
    lens_rows: int
    means: RowMeans = field(default_factory=RowMeans)

    def add(self, batch: Batch, states: States) -> None:
        """Add the rows of a batch."""
        labels, values = [], []
        for block in range(self.anatomy.blocks):
            for name, value in _contributions(states, block).items():
                labels.append({"measure": name, "block": block})
                values.append(value)
        self.means.add(batch, _grouped(batch, batch.mask), labels, torch.stack(values))
        if int(batch.rows[0]) < self.lens_rows:
            self._lens(batch, states)

    @torch.no_grad()
    def _lens(self, batch: Batch, states: States) -> None:
        model, chosen = self.subject.model, torch.zeros_like(batch.mask)
        for mask in groups_of(batch).values():
            from_end = mask.flip(1).cumsum(1).flip(1)
            chosen |= mask & (from_end <= LENS_POSITIONS)
        chosen[int((batch.rows < self.lens_rows).sum()) :] = False
        row, column = chosen.nonzero(as_tuple=True)
        kinds = torch.full(row.shape, int(Kind.TEXT), device=row.device)
        out = model.logits(states.final[row, column], kinds).float().log_softmax(-1)
        best = out.topk(TOP, -1).indices
        labels, values = [], []
        for block, stream in enumerate(states.stream, -1):
            hidden = self.anatomy.final_norm(stream[row, column])
            log_probs = model.logits(hidden, kinds).float().log_softmax(-1)
            # Impossible tokens have no probability in either.
            terms = out.exp() * (out - log_probs)
            kl = terms.masked_fill(out.isneginf(), 0).sum(-1)
            same = (log_probs.topk(TOP, -1).indices[:, :, None] == best[:, None]).sum((1, 2)) / TOP
            for name, value in (("kl", kl), ("overlap", same)):
                whole = torch.zeros(chosen.shape, device=value.device).to(value)
                whole[row, column] = value
                labels.append({"measure": name, "block": block})
                values.append(whole)
        self.means.add(batch, _grouped(batch, chosen), labels, torch.stack(values))

    def table(self) -> pandas.DataFrame:
        """`group, measure, block, operations` (0: all), `n, mean, low, high`."""
        return self.means.table()


def _contributions(states: States, block: int) -> dict[str, Tensor]:
    """The measures (B, T) of a block."""
    stream, attention, mlp = states.before[block], states.attention[block], states.mlp[block]
    middle, both = states.attention_stream[block], attention + mlp
    sizes = [x.norm(dim=-1).clamp(min=1e-12) for x in (stream, attention, mlp, middle, both)]
    h, a, m, h_middle, am = sizes
    cosine = torch.cosine_similarity
    return {
        "norm_attention": a,
        "norm_mlp": m,
        "norm_stream": h,
        "relative_attention": a / h,
        "relative_mlp": m / h_middle,
        "relative_both": am / h,
        "cosine_attention": cosine(attention, stream, dim=-1),
        "cosine_mlp": cosine(mlp, middle, dim=-1),
        "cosine_both": cosine(both, stream, dim=-1),
    }


# ----------------------------------------------------------------------------- skipped blocks


def skip_effects(subject: Subject, anatomy: Anatomy, texts: Sequence[Text]) -> pandas.DataFrame:
    """How much skipping block `skipped` changes each later block's contribution, relative to it.

    `where`: `all`, skipped at all positions; `later`, skipped at the first ones only (the question
    of a latent model, the first half of a text) and measured after them. `where, group, skipped,
    block, operations, n, mean, low, high`. The inputs of latents stay those of the whole model.
    Blocks before the skipped one are not run again.
    """
    means, blocks = RowMeans(), range(anatomy.blocks)
    labels: list[Label] = [{"skipped": s, "block": b} for s, b in itertools.combinations(blocks, 2)]
    for batch in batched(subject, texts, anatomy.blocks) if labels else ():
        states = capture(subject.model, anatomy, batch.inputs, batch.mask)
        whole = _changes(states)
        sizes = [change.norm(dim=-1).clamp(min=1e-12) for change in whole]
        early = _first_part(batch)
        for where, columns, seen in (
            ("all", None, batch.mask),
            ("later", early, batch.mask & ~early),
        ):
            values = []
            for block in blocks[:-1]:
                with (
                    replayed(anatomy, states, block),
                    skipped(anatomy, block, columns),
                    captured(subject.model.base, anatomy) as without,
                ):
                    read(subject.model, batch.inputs, batch.mask)
                changes = _changes(without)
                values += [
                    (whole[later] - changes[later]).norm(dim=-1) / sizes[later]
                    for later in blocks[block + 1 :]
                ]
            groups = _grouped(batch, seen, where=where)
            groups[("where", where), ("group", "every")] = seen
            means.add(batch, groups, labels, torch.stack(values))
    return means.table()


def _changes(states: States) -> list[Tensor]:
    """What each block adds to the stream, (B, T, d)."""
    return [after - before for before, after in itertools.pairwise(states.stream)]


def _first_part(batch: Batch) -> Tensor:
    """The columns (B, T) where blocks are skipped for `later`."""
    if (batch.places == Place.START).any():
        return (batch.places == Place.QUESTION) | (batch.places == Place.START)
    return batch.mask & (batch.positions < (batch.mask.sum(1, keepdim=True) + 1) // 2)


# ------------------------------------------------------------------------- G. attention mass


def attention_mass(subject: Subject, anatomy: Anatomy, texts: Sequence[Text]) -> pandas.DataFrame:
    """Where answer tokens and latents look: `source` (latent, answer), `target` (question, START,
    latents, answer; each the row's columns up to the source's own), `block, head` (-1: their mean),
    `operations, n, mean, low, high`."""
    means = RowMeans()
    for batch in batched(subject, texts, anatomy.blocks):
        weights = attention_weights(subject.model, anatomy, batch.inputs, batch.mask)
        places = {place.name.lower(): batch.places == place for place in Place if place}
        labels, values = [], []
        for target, block in itertools.product(places, range(len(weights))):
            mass = (weights[block] * places[target][:, None, None]).sum(-1)
            for head in range(-1, mass.shape[1]):
                labels.append({"target": target, "block": block, "head": head})
                values.append(mass.mean(1) if head < 0 else mass[:, head])
        sources = {(("source", name),): places[name] for name in ("latent", "answer")}
        means.add(batch, sources, labels, torch.stack(values))
    return means.table()
