"""F. Use of depth, after *Do language models use their depth efficiently?*; G. attention mass.

With a and m the outputs of attention and MLP of a block, h the stream before it and h' = h + a.
Every number is first averaged over the positions of a row, then over rows, with an interval.

B rows, T columns, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pandas
import torch
from torch import Tensor

from latent_reasoning.inside.capture import (
    Anatomy,
    States,
    attention_weights,
    captured,
    read,
    skipped,
)
from latent_reasoning.inside.reasoning import Subject
from latent_reasoning.inside.sequences import Batch, Place, Text, batched
from latent_reasoning.inside.statistics import mean_interval
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


@dataclass
class Depth:
    """An observer of norms, contributions, cosines and the lens by layer (for `lens_rows`)."""

    subject: Subject
    anatomy: Anatomy
    lens_rows: int
    lines: list[dict] = field(default_factory=list)

    def add(self, batch: Batch, states: States) -> None:
        """Add the rows of a batch."""
        measures = [
            (block, name, value)
            for block in range(self.anatomy.blocks)
            for name, value in _contributions(states, block).items()
        ]
        self._record(batch, measures, batch.mask)
        if int(batch.rows[0]) < self.lens_rows:
            self._lens(batch, states)

    def _record(
        self, batch: Batch, measures: list[tuple[int, str, Tensor]], chosen: Tensor
    ) -> None:
        """A line for each row, group and measure (block, name, (B, T)): the mean over positions."""
        for group, mask in groups_of(batch).items():
            mask = mask & chosen
            count = mask.sum(1)
            rows = (count > 0).nonzero()[:, 0]
            for block, name, value in measures:
                means = value.masked_fill(~mask, 0).sum(1) / count.clamp(min=1)
                for row in rows.tolist():
                    self.lines.append(
                        {
                            "group": group,
                            "operations": int(batch.operations[row]),
                            "block": block,
                            "measure": name,
                            "mean": float(means[row]),
                        }
                    )

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
        measures = []
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
                measures.append((block, name, whole))
        self._record(batch, measures, chosen)

    def table(self) -> pandas.DataFrame:
        """`group, operations` (0: all), `measure, block, n, mean, low, high`."""
        return summarised(self.lines, ["group", "measure", "block"])


def groups_of(batch: Batch) -> dict[str, Tensor]:
    """The columns (B, T) of each group."""
    return {
        name: torch.stack([batch.places == place for place in places]).any(0)
        for name, places in GROUPS.items()
    }


def summarised(lines: list[dict], keys: list[str]) -> pandas.DataFrame:
    """Means over rows with their intervals, over all rows (`operations` 0) and by K."""
    table, made = pandas.DataFrame(lines), []
    if table.empty:
        return pandas.DataFrame(columns=[*keys, "operations", "n", "mean", "low", "high"])
    several = table["operations"].nunique() > 1
    for operations in [[], ["operations"]] if several else [[]]:
        for place, group in table.groupby([*keys, *operations], sort=False):
            mean, low, high = mean_interval(group["mean"])
            line = dict(zip([*keys, *operations], place, strict=True))
            line.setdefault("operations", 0)
            made.append(line | {"n": len(group), "mean": mean, "low": low, "high": high})
    return pandas.DataFrame(made)


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
    of a latent model, the first half of a text) and measured after them. `group, operations,
    skipped, block, n, mean, low, high`. The inputs of latents stay those of the whole model.
    """
    lines: list[dict] = []
    for batch in batched(subject, texts, anatomy.blocks):
        whole = _changes(subject, anatomy, batch)
        early = _first_part(batch)
        for block in range(anatomy.blocks):
            for where, columns, seen in (
                ("all", None, batch.mask),
                ("later", early, batch.mask & ~early),
            ):
                with skipped(anatomy, block, columns):
                    without = _changes(subject, anatomy, batch)
                for later in range(block + 1, anatomy.blocks):
                    change = (whole[later] - without[later]).norm(dim=-1)
                    change = change / whole[later].norm(dim=-1).clamp(min=1e-12)
                    place = {"where": where, "skipped": block, "block": later}
                    lines += _row_means(batch, change, seen, place)
    return summarised(lines, ["where", "group", "skipped", "block"])


def _changes(subject: Subject, anatomy: Anatomy, batch: Batch) -> list[Tensor]:
    """What each block adds to the stream, (B, T, d); a skipped one adds nothing."""
    with captured(subject.model.base, anatomy) as states:
        read(subject.model, batch.inputs, batch.mask)
    stream = states.stream
    return [after - before for before, after in pairwise(stream)]


def _first_part(batch: Batch) -> Tensor:
    """The columns (B, T) where blocks are skipped for `later`."""
    if (batch.places == Place.START).any():
        return (batch.places == Place.QUESTION) | (batch.places == Place.START)
    return batch.mask & (batch.positions < (batch.mask.sum(1, keepdim=True) + 1) // 2)


def _row_means(batch: Batch, value: Tensor, seen: Tensor, place: dict) -> list[dict]:
    lines = []
    for group, mask in {**groups_of(batch), "every": batch.mask}.items():
        mask = mask & seen
        count = mask.sum(1)
        means = value.masked_fill(~mask, 0).sum(1) / count.clamp(min=1)
        lines += [
            place | {"group": group, "operations": int(k), "mean": float(mean)}
            for k, mean, some in zip(batch.operations, means, count, strict=True)
            if some
        ]
    return lines


# ------------------------------------------------------------------------- G. attention mass


def attention_mass(subject: Subject, anatomy: Anatomy, texts: Sequence[Text]) -> pandas.DataFrame:
    """Where answer tokens and latents look: `source` (latent, answer), `target` (question, START,
    latents, answer; each the row's columns up to the source's own), `block, head` (-1: their mean),
    `operations, n, mean, low, high`."""
    lines: list[dict] = []
    for batch in batched(subject, texts, anatomy.blocks):
        weights = attention_weights(subject.model, anatomy, batch.inputs, batch.mask)
        targets = {place.name.lower(): batch.places == place for place in Place if place}
        for source in ("latent", "answer"):
            from_ = targets[source]
            count = from_.sum(1)
            for target, to in targets.items():
                for block, weight in enumerate(weights):
                    mass = (weight * to[:, None, None]).sum(-1).masked_fill(~from_[:, None], 0)
                    means = mass.sum(-1) / count.clamp(min=1)[:, None]
                    for head, of_head in [(-1, means.mean(1)), *enumerate(means.T)]:
                        place = {"source": source, "target": target, "block": block, "head": head}
                        lines += [
                            place | {"operations": int(k), "mean": float(mean)}
                            for k, mean, some in zip(batch.operations, of_head, count, strict=True)
                            if some
                        ]
    return summarised(lines, ["source", "target", "block", "head"])
