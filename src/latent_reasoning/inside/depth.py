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

Label = tuple[tuple[str, object], ...]
"""Columns of a table's line with their values."""


def label(**columns: object) -> Label:
    """The label of these columns."""
    return tuple(columns.items())


def groups_of(batch: Batch) -> dict[str, Tensor]:
    """The columns (B, T) of each group."""
    return {
        name: torch.isin(batch.places, torch.tensor(places, device=batch.places.device))
        for name, places in GROUPS.items()
    }


@dataclass
class RowMeans:
    """Numbers of positions, averaged over those of each row, and then over rows."""

    kept: dict[tuple[Label, tuple[Label, ...]], list[tuple[Tensor, Tensor]]] = field(
        default_factory=dict
    )

    def add(self, batch: Batch, groups: dict[Label, Tensor], values: dict[Label, Tensor]) -> None:
        """Add M values (B, T) at the columns (B, T) of each group, all by their labels."""
        stacked = torch.stack([*values.values()])
        for group, mask in groups.items():
            count = mask.sum(1)
            means = stacked.masked_fill(~mask, 0).sum(-1)[:, count > 0] / count[count > 0]
            rows = batch.operations[(count > 0).cpu()]
            if len(rows):
                key = group, tuple(values)
                self.kept.setdefault(key, []).append((rows, means.double().cpu()))

    def table(self) -> pandas.DataFrame:
        """A line a label and group, with `operations` (0: all rows, also those that state no
        equations; K apart where several occur, in `FEWEST` rows at least), `n, mean, low, high`."""
        parts = {
            key: [torch.cat(x, -1) for x in zip(*p, strict=True)] for key, p in self.kept.items()
        }
        every = {k for rows, _ in parts.values() for k in rows.tolist()}
        lines = []
        for (group, names), (rows, means) in parts.items():
            for k in [0, *sorted(every - {0})] if len(every) > 1 else [0]:
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


def _grouped(batch: Batch, within: Tensor, **columns: object) -> dict[Label, Tensor]:
    """The columns of each group that lie `within` (B, T), by the group's label."""
    groups = groups_of(batch).items()
    return {label(**columns, group=name): mask & within for name, mask in groups}


@dataclass
class Depth:
    """An observer of norms, contributions, cosines and the lens by layer (for `lens_rows`), with
    `means` by `group, measure, block`."""

    subject: Subject
    anatomy: Anatomy
    lens_rows: int
    means: RowMeans = field(default_factory=RowMeans)

    def add(self, batch: Batch, states: States) -> None:
        """Add the rows of a batch."""
        values = {
            label(measure=name, block=block): value
            for block in range(self.anatomy.blocks)
            for name, value in _contributions(states, block).items()
        }
        self.means.add(batch, _grouped(batch, batch.mask), values)
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
        values = {}
        for block, stream in enumerate(states.stream, -1):
            hidden = self.anatomy.final_norm(stream[row, column])
            log_probs = model.logits(hidden, kinds).float().log_softmax(-1)
            # Impossible tokens have no probability in either.
            terms = out.exp() * (out - log_probs)
            kl = terms.masked_fill(out.isneginf(), 0).sum(-1)
            same = (log_probs.topk(TOP, -1).indices[:, :, None] == best[:, None]).sum((1, 2)) / TOP
            for name, value in (("kl", kl), ("overlap", same)):
                whole = values[label(measure=name, block=block)] = value.new_zeros(chosen.shape)
                whole[row, column] = value
        self.means.add(batch, _grouped(batch, chosen), values)


def _contributions(states: States, block: int) -> dict[str, Tensor]:
    """The measures (B, T) of a block."""
    stream, attention, mlp = states.stream[block], states.attention[block], states.mlp[block]
    middle, both = states.attention_stream[block], attention + mlp
    h, a, m, h_middle, am = map(_size, (stream, attention, mlp, middle, both))
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


def _size(states: Tensor) -> Tensor:
    """L2 norms, to divide by."""
    return states.norm(dim=-1).clamp(min=1e-12)


# ----------------------------------------------------------------------------- skipped blocks


def skip_effects(subject: Subject, anatomy: Anatomy, texts: Sequence[Text]) -> pandas.DataFrame:
    """How much skipping block `skipped` changes each later block's contribution, relative to it.

    `where`: `all`, skipped at all positions; `later`, skipped at the first ones only (the question
    of a latent model, the first half of a text) and measured after them. `where, group, skipped,
    block, operations, n, mean, low, high`. The inputs of latents stay those of the whole model.
    Blocks before the skipped one are not run again.
    """
    means, blocks = RowMeans(), range(anatomy.blocks)
    for batch in batched(subject, texts, anatomy.blocks) if len(blocks) > 1 else ():
        states = capture(subject.model, anatomy, batch.inputs, batch.mask)
        whole = _changes(states)
        early = _first_part(batch)
        for where, columns, seen in (
            ("all", None, batch.mask),
            ("later", early, batch.mask & ~early),
        ):
            values = {}
            for block in blocks[:-1]:
                with (
                    replayed(anatomy, states, block),
                    skipped(anatomy, block, columns),
                    captured(subject.model.base, anatomy) as without,
                ):
                    read(subject.model, batch.inputs, batch.mask)
                changes = _changes(without)
                for later in blocks[block + 1 :]:
                    change = (whole[later] - changes[later]).norm(dim=-1)
                    values[label(skipped=block, block=later)] = change / _size(whole[later])
            groups = _grouped(batch, seen, where=where) | {label(where=where, group="every"): seen}
            means.add(batch, groups, values)
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
        values = {}
        for target, block in itertools.product(places, range(len(weights))):
            mass = (weights[block] * places[target][:, None, None]).sum(-1)
            for head in range(-1, mass.shape[1]):
                of_head = mass.mean(1) if head < 0 else mass[:, head]
                values[label(target=target, block=block, head=head)] = of_head
        sources = {label(source=name): places[name] for name in ("latent", "answer")}
        means.add(batch, sources, values)
    return means.table()
