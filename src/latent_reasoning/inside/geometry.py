"""E. The geometry of latent space, after *Visualizing LLM Latent Space Geometry Through
Dimensionality Reduction* (arXiv 2511.21594), and the same spaces with the latents in them.

Everything is accumulated batch by batch; what is kept does not grow with the number of texts but
for a sample of them. A PCA of all states comes from their exact second moments.

S = 6 L + 2 states of a model of L blocks, P positions, d hidden size.
"""

from __future__ import annotations

import numpy
import pandas
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from torch import Tensor
from torch.nn.functional import normalize

from latent_reasoning.inside.capture import EMBEDDING, Anatomy, States, capture, names
from latent_reasoning.inside.reasoning import Reasoning, Subject
from latent_reasoning.inside.sequences import Batch, Place

SEED = 0
FEWEST = 0.1
"""A position is shown where at least this share of the texts reaches it."""
VOCABULARY = 2000
"""Single tokens that are read: the whole vocabulary, or as many of it by chance."""
KEPT = 100
"""Texts of which each gives its means over positions, and a position to F6 and F7: the first."""
STREAM = (EMBEDDING, "attention_stream", "mlp_stream")
"""The states of the stream itself."""


class Moments:
    """Count, sum and second moment of vectors: an exact PCA of all of them, in one pass."""

    def __init__(self, size: int) -> None:
        self.count, self.sum = 0, torch.zeros(size, dtype=torch.float64)
        self.outer = torch.zeros(size, size, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Add vectors (M, d)."""
        self.count += len(vectors)
        self.sum += vectors.sum(0).double().cpu()
        self.outer += (vectors.T @ vectors).double().cpu()

    def components(self) -> tuple[NDArray, NDArray, NDArray]:
        """Mean (d,), the first two components (2, d) and their shares of the variance; signs as
        sklearn's."""
        mean = self.sum / self.count
        covariance = self.outer / self.count - mean[:, None] * mean
        values, vectors = torch.linalg.eigh(covariance)
        chosen = vectors.T.flip(0)[:2].numpy()
        largest = numpy.abs(chosen).argmax(1)
        chosen = chosen * numpy.sign(chosen[range(2), largest])[:, None]
        return mean.numpy(), chosen, (values.flip(0)[:2] / values.sum()).numpy()


class Geometry:
    """An observer of norms, means and moments."""

    def __init__(self, anatomy: Anatomy, hidden: int, longest: int) -> None:
        self.names = names(anatomy.blocks)
        self.stream = [i for i, (name, _) in enumerate(self.names) if name in STREAM]
        self.norms = torch.zeros(len(self.names), longest)
        self.unit = torch.zeros(len(self.stream), longest, hidden)
        self.raw = torch.zeros(longest, hidden)
        self.reached = torch.zeros(longest)
        self.moments = Moments(hidden)
        # Of the first texts: unit means over positions, and states at a position by chance.
        self.kept_means: list[Tensor] = []
        self.kept_parts: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(SEED)

    def add(self, batch: Batch, states: States) -> None:
        """Add the texts of a batch."""
        mask, position = batch.mask, batch.positions[batch.mask].cpu()
        self.reached.index_add_(0, position, torch.ones(len(position)))
        fewer = int((batch.rows < KEPT).sum())
        weight = (mask / mask.sum(1, keepdim=True))[:fewer, :, None]
        at = self._places(batch, fewer)
        means, parts, totals = [], [], iter(self.unit)
        for norms, (name, _, value) in zip(self.norms, states.named(), strict=True):
            flat = value[mask].float()
            norms.index_add_(0, position, flat.norm(dim=-1).cpu())
            if name in STREAM:
                unit = normalize(flat, dim=-1)
                self.raw.index_add_(0, position, flat.cpu() / len(self.stream))
                next(totals).index_add_(0, position, unit.cpu())
                self.moments.add(unit)
                some = value[:fewer].float().masked_fill(~mask[:fewer, :, None], 0)
                means.append((normalize(some, dim=-1) * weight).sum(1).cpu())
            if name in ("attention", "mlp"):
                parts.append(value[:fewer][torch.arange(fewer), at].float().cpu())
        if fewer:
            self.kept_means.append(torch.stack(means, 1))
            self.kept_parts.append(torch.stack(parts, 1))

    def _places(self, batch: Batch, count: int) -> Tensor:
        """A column of each of the first rows, by chance, and the first only where it is alone."""
        if not count:
            return torch.zeros(0, dtype=torch.long)
        allowed = (batch.positions[:count] > 0).float().cpu()
        allowed[allowed.sum(1) == 0, 0] = 1  # a text of one token
        return torch.multinomial(allowed, 1, generator=self.generator)[:, 0]

    @property
    def positions(self) -> int:
        """Positions that enough texts reach."""
        return int((self.reached >= max(1, FEWEST * self.reached[0])).sum())

    def means(self, total: Tensor) -> Tensor:
        """Means over texts (.., P, d) of sums by position, `unit` or `raw`."""
        return total[..., : self.positions, :] / self.reached[: self.positions, None]


def norm_table(geometry: Geometry) -> pandas.DataFrame:
    """F1, F4: the mean norm of each state at each position: `part, block, position, n, norm`."""
    count = geometry.positions
    norms = geometry.norms[:, :count] / geometry.reached[:count]
    return pandas.DataFrame(
        [
            {"part": part, "block": block, "position": p, "n": int(geometry.reached[p]), "norm": x}
            for (part, block), row in zip(geometry.names, norms.tolist(), strict=True)
            for p, x in enumerate(row)
        ]
    )


@torch.no_grad()
def single_token_norms(subject: Subject, anatomy: Anatomy) -> pandas.DataFrame:
    """F2, F3: norms of the states of texts of one token: `token` and a column a state."""
    model = subject.model
    count = len(subject.tokenizer)
    tokens = torch.arange(count)
    if count > VOCABULARY:
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.randperm(count, generator=generator)[:VOCABULARY].sort().values
    norms = []
    for part in tokens.split(subject.batch):
        inputs = model.embed(part.to(model.device))[:, None]
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=model.device)
        states = capture(model, anatomy, inputs, mask)
        norms.append(torch.stack([v[:, 0].float().norm(dim=-1) for *_, v in states.named()], 1))
    columns = [f"{part}_{block}" for part, block in names(anatomy.blocks)]
    table = pandas.DataFrame(torch.cat(norms).cpu().numpy(), columns=columns)
    table.insert(0, "token", tokens.numpy())
    return table


def points(geometry: Geometry, umap: bool) -> pandas.DataFrame:
    """F5 to F11: `figure, panel, part, block, index` (position or text), components `c1` .. `c6`,
    and `explained`, their shares of the variance as text."""
    mean, axes, shares = geometry.moments.components()
    unit, frames = geometry.means(geometry.unit), []
    where = [geometry.names[i] for i in geometry.stream]
    for panel, vectors in (
        ("means over texts", unit.transpose(0, 1)),
        ("means over positions", torch.cat(geometry.kept_means)),
    ):
        projected = (vectors.numpy() - mean) @ axes.T
        frames.append(_frame("stream", panel, projected, where, shares))
    frames += _part_frames(geometry, umap)
    for figure, means, first in (
        ("positions_unit", unit.mean(0), 0),
        ("positions_raw", geometry.means(geometry.raw), 1),
    ):
        by_position = means[first:, None]
        if len(by_position) > 6:
            made = _fitted(figure, "", by_position, [("stream", -1)], 6)
            frames.append(made.assign(index=made["index"] + first))
    return pandas.concat(frames, ignore_index=True)


def _part_frames(geometry: Geometry, umap: bool) -> list[pandas.DataFrame]:
    """F6, F7: attention's against the MLP's outputs of the intermediate blocks, of the sample."""
    chosen, where = _inner_parts(geometry)
    frames = [
        _fitted("parts", "raw", chosen, where, 2),
        _fitted("parts", "unit", normalize(chosen, dim=-1), where, 2),
    ]
    if umap:
        import umap as library

        reducer = library.UMAP(metric="cosine", random_state=SEED, n_jobs=1)
        projected = reducer.fit_transform(chosen.flatten(0, 1).numpy())
        projected = projected.reshape(*chosen.shape[:2], 2)
        frames.append(_frame("parts", "umap", projected, where, None))
    return frames


def _inner_parts(geometry: Geometry) -> tuple[Tensor, list[tuple[str, int]]]:
    """The sample's outputs (M, parts, d) of the blocks between the first and the last, or of all
    where there is none between, and their names."""
    where = [n for n in geometry.names if n[0] in ("attention", "mlp")]
    last = max(block for _, block in where)
    inner = [i for i, (_, b) in enumerate(where) if 0 < b < last] or list(range(len(where)))
    return torch.cat(geometry.kept_parts)[:, inner], [where[i] for i in inner]


def separation(geometry: Geometry) -> dict[str, float]:
    """How far attention's and the MLP's outputs lie apart: the silhouette (-1 to 1, cosine) of the
    sample's intermediate blocks, and with shuffled names."""
    parts, where = _inner_parts(geometry)
    flat = parts.flatten(0, 1).numpy()
    labels = numpy.array([name for name, _ in where] * len(parts))
    shuffled = numpy.random.default_rng(SEED).permutation(labels)
    return {
        "silhouette": float(silhouette_score(flat, labels, metric="cosine")),
        "shuffled": float(silhouette_score(flat, shuffled, metric="cosine")),
        "n": len(labels),
    }


def _fitted(figure: str, panel: str, vectors: Tensor, where: list, count: int) -> pandas.DataFrame:
    """Vectors (M, states, d) in their own first principal components, as a table."""
    flat = vectors.flatten(0, 1).numpy()
    fitted = PCA(count).fit(flat)
    projected = fitted.transform(flat).reshape(*vectors.shape[:2], count)
    return _frame(figure, panel, projected, where, fitted.explained_variance_ratio_)


def _frame(
    figure: str, panel: str, projected: NDArray, where: list, shares: NDArray | None
) -> pandas.DataFrame:
    """Points (M, states, components) as a table."""
    count, states, size = projected.shape
    parts, blocks = zip(*where, strict=True)
    index = numpy.repeat(range(count), states)
    names = {"figure": figure, "panel": panel, "part": parts * count, "block": blocks * count}
    components = [f"c{i}" for i in range(1, size + 1)]
    table = pandas.DataFrame(projected.reshape(-1, size), columns=components)
    explained = "" if shares is None else " ".join(f"{x:.3f}" for x in shares)
    table = pandas.DataFrame(names | {"index": index}).join(table)
    return table.assign(explained=explained)


# ------------------------------------------------------------------ the latents in these spaces


class Kinds:
    """An observer of the mean unit stream of each kind of column: question, START, latents by their
    step, answer."""

    def __init__(self, blocks: int, hidden: int, most: int) -> None:
        latents = (f"latent {j}" for j in range(1, most + 1))
        self.labels = ["question", "START", *latents, "answer"]
        self.sum = torch.zeros(len(self.labels), blocks + 1, hidden)
        self.count = torch.zeros(len(self.labels))

    def add(self, batch: Batch, states: States) -> None:
        """Add the columns of a batch."""
        kind = torch.where(batch.places == Place.ANSWER, len(self.labels) - 1, batch.step + 1)
        kind = torch.where(batch.places == Place.QUESTION, 0, kind)[batch.mask].cpu()
        stream = torch.stack([s[batch.mask].float() for s in states.stream], 1)
        self.sum.index_add_(0, kind, normalize(stream, dim=-1).cpu())
        self.count.index_add_(0, kind, torch.ones(len(kind)))

    def table(self, moments: Moments) -> pandas.DataFrame:
        """Their places in the PCA of all stream states: `kind, block, c1, c2, n`."""
        mean, axes, shares = moments.components()
        means = (self.sum / self.count.clamp(min=1)[:, None, None]).numpy()
        where = [("stream", block - 1) for block in range(means.shape[1])]
        table = _frame("kinds", "", (means - mean) @ axes.T, where, shares)
        table.insert(0, "kind", [self.labels[i] for i in table["index"]])
        counts = self.count.int().numpy()[table["index"]]
        return table.assign(n=counts)[counts > 0].drop(columns=["figure", "panel", "part", "index"])


def latent_points(reasoning: Reasoning) -> pandas.DataFrame:
    """The latents that rows make, h_0 .. h_n, in their own PCA: `row, step, c1, c2, explained`,
    `value` (v_(j+1), the value reached there; <NA> after the last) and `correct`."""
    made = torch.arange(reasoning.hidden.shape[1]) <= reasoning.steps[:, None]
    row, step = (place.numpy() for place in made.nonzero(as_tuple=True))
    table = _fitted("latents", "", reasoning.hidden[made].float()[:, None], [("stream", -1)], 2)
    results = [[e.result for e in equations] for equations in reasoning.equations]
    steps = zip(row.tolist(), step.tolist(), strict=True)
    reached = [results[i][j] if j < len(results[i]) else None for i, j in steps]
    correct = reasoning.own["correct"].to_numpy()[row]
    columns = {"row": row, "step": step, "value": reached, "correct": correct}
    return table[["c1", "c2", "explained"]].assign(**columns)


@torch.no_grad()
def latent_distances(subject: Subject, reasoning: Reasoning) -> pandas.DataFrame:
    """A line for each latent input z_j that a row makes: `row, step, norm`, `nearest` (distance to
    the nearest token embedding), `nearest_cosine`, `change` (distance from the input before; nan
    for the first) and `token_norm`, the mean norm of the embeddings."""
    model = subject.model
    vocabulary = torch.arange(len(subject.tokenizer), device=model.device)
    matrix = model.embed(vocabulary).float()
    columns = ["row", "step", "norm", "nearest", "nearest_cosine", "change", "token_norm"]
    frames = [pandas.DataFrame(columns=columns)]
    for j in range(1, int(reasoning.steps.max()) + 1):
        rows = (reasoning.steps >= j).nonzero()[:, 0]
        z = reasoning.inputs[rows, j - 1].float()
        before = reasoning.inputs[rows, j - 2].float() if j > 1 else torch.full_like(z, torch.nan)
        on_device = z.to(matrix.device)
        nearest = [torch.cdist(part, matrix).amin(1).cpu() for part in on_device.split(64)]
        cosine = (normalize(on_device, dim=-1) @ normalize(matrix, dim=-1).T).amax(1).cpu()
        numbers = {
            "row": rows.numpy(),
            "step": j,
            "norm": z.norm(dim=-1).numpy(),
            "nearest": torch.cat(nearest).numpy(),
            "nearest_cosine": cosine.numpy(),
            "change": (z - before).norm(dim=-1).numpy(),
            "token_norm": float(matrix.norm(dim=-1).mean()),
        }
        frames.append(pandas.DataFrame(numbers))
    return pandas.concat(frames[1:] or frames)
