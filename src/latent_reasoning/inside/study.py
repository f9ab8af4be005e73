"""One model on one data set: all analyses, as tables, and the folder that they are written to.

A to D, G, H and the latents' geometry need a latent model; E and F any causal model.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas

from latent_reasoning.data.rows import Row
from latent_reasoning.inside import chain, depth, errors, geometry, interventions, lens, need
from latent_reasoning.inside.capture import Anatomy, capture
from latent_reasoning.inside.figures import draw_all
from latent_reasoning.inside.findings import findings
from latent_reasoning.inside.reasoning import Reasoning, Subject, read_reasoning
from latent_reasoning.inside.sequences import Text, batched, latent_sequences, length_of
from latent_reasoning.runtime.files import atomic_directory, write_json, write_sums

EXAMPLES = 20
"""Rows of the page's example view: the first of the split, whatever their answers."""
LONG = ("words", "answers", "points", "single_tokens", "latents", "distances", "signals")
"""Tables with a line a row of the data, or more."""


@dataclass
class Study:
    """The tables by file name, the summary's numbers and the page's examples."""

    tables: dict[str, pandas.DataFrame] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path, science: Mapping[str, Any] | None = None) -> None:
        """Write a folder of `{table}.csv` (long ones as .parquet), `findings.csv`, `summary.json`,
        `examples.json` and `figures/`, atomically."""
        self.tables["findings"] = findings(self.tables, self.summary)
        with atomic_directory(folder) as temporary:
            for name, table in self.tables.items():
                if name in LONG:
                    table.to_parquet(temporary / f"{name}.parquet", index=False)
                else:
                    table.to_csv(temporary / f"{name}.csv", index=False, float_format="%.6g")
            draw_all(self.tables, self.summary, temporary / "figures")
            write_json(temporary / "examples.json", self.examples)
            summary = _plain(self.summary) | {"science": science or {}}
            write_json(temporary / "summary.json", summary)
            write_sums(temporary)


def _plain(value: Any) -> Any:
    """A summary without nan, which JSON lacks: null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class Options:
    """Rows looked at closely (`sample`), the most latent steps, and a model's forced steps."""

    sample: int = 100
    most: int = 10
    forced_steps: int | None = None


def study_latent(
    subject: Subject, rows: Sequence[Row], training: Sequence[Row], options: Options
) -> Study:
    """All analyses of a latent model; its probes are trained on the rows `training`."""
    started, study = time.monotonic(), Study()
    anatomy = Anatomy.of(subject.model.base)
    reasoning = read_reasoning(subject, rows, options.most, options.forced_steps)
    _causes(study, subject, reasoning)
    texts = latent_sequences(subject, reasoning)
    states = chain.Chain.empty(reasoning, anatomy.blocks)
    kinds = geometry.Kinds(anatomy.blocks, reasoning.hidden.shape[-1], int(reasoning.steps.max()))
    seen = _space(study, subject, anatomy, texts, options, [states, kinds])
    study.tables["kinds"] = kinds.table(seen.moments)
    study.tables["latents"] = geometry.latent_points(reasoning)
    study.tables["distances"] = geometry.latent_distances(subject, reasoning)
    study.tables["attention"] = depth.attention_mass(subject, anatomy, texts[: options.sample])
    signals = chain.trajectory_signals(reasoning, states)
    study.tables |= {"signals": signals, "signal_areas": chain.signal_areas(signals)}
    others = read_reasoning(subject, training, options.most, options.forced_steps)
    other_states = chain.Chain.empty(others, anatomy.blocks)
    _observe(subject, anatomy, latent_sequences(subject, others), [other_states])
    study.tables["probes"] = chain.probe((others, other_states), (reasoning, states))
    study.examples = lens.examples_of(subject, reasoning, states, anatomy, EXAMPLES)
    study.summary |= {"training_rows": len(training), "latent": True}
    study.summary["seconds"] = time.monotonic() - started
    return study


def study_plain(subject: Subject, texts: Sequence[Text], options: Options) -> Study:
    """Geometry and depth (E, F) of any causal model on texts."""
    started, study = time.monotonic(), Study()
    anatomy = Anatomy.of(subject.model.base)
    _space(study, subject, anatomy, texts, options, [])
    study.summary |= {"latent": False, "n": len(texts), "seconds": time.monotonic() - started}
    return study


def _causes(study: Study, subject: Subject, reasoning: Reasoning) -> None:
    """A, B and C: from the latents alone."""
    tokens, words = lens.read_words(subject, reasoning)
    donors = interventions.choose_donors(reasoning)
    changed = interventions.intervene(subject, reasoning, donors)
    needed = need.needed_steps(reasoning)
    study.tables |= {
        "words": words,
        "lens": lens.lens_matrix(subject, reasoning, tokens),
        "errors": errors.error_shares(errors.first_errors(subject, reasoning, tokens)),
        "answers": changed.drop(columns="log_probability"),
        "interventions": interventions.effects(changed),
        "counterfactual": interventions.counterfactual_shares(changed, donors),
        "need": needed,
        "forced": need.forced_accuracy(reasoning),
    }
    own = reasoning.own["correct"]
    study.summary |= {
        "n": len(own),
        "correct": int(own.sum()),
        "accuracy": float(own.mean()),
        "steps_mean": float(reasoning.steps.float().mean()),
        "need": need.agreement(needed),
    }


def _observe(subject: Subject, anatomy: Anatomy, texts: Sequence[Text], observers: list) -> None:
    """One pass over the texts for all observers, which `add` each batch with its states."""
    for batch in batched(subject, texts, anatomy.blocks):
        states = capture(subject.model, anatomy, batch.inputs, batch.mask)
        for observer in observers:
            observer.add(batch, states)
        del states  # before the next batch's are captured


def _space(
    study: Study,
    subject: Subject,
    anatomy: Anatomy,
    texts: Sequence[Text],
    options: Options,
    observers: list,
) -> geometry.Geometry:
    """E and F: one pass over the texts for all observers, then skipped blocks and single tokens."""
    hidden = subject.model.base.config.hidden_size
    seen = geometry.Geometry(anatomy, hidden, max(map(length_of, texts)))
    used = depth.Depth(subject, anatomy, options.sample)
    _observe(subject, anatomy, texts, [seen, used, *observers])
    umap = importlib.util.find_spec("umap") is not None
    if not umap:
        print("F7 (UMAP) is left out: install umap-learn to have it")
    study.tables |= {
        "norms": geometry.norm_table(seen),
        "single_tokens": geometry.single_token_norms(subject, anatomy),
        "points": geometry.points(seen, umap),
        "depth": used.means.table(),
        "skips": depth.skip_effects(subject, anatomy, texts[: options.sample]),
    }
    study.summary["separation"] = geometry.separation(seen)
    study.summary |= {"blocks": anatomy.blocks, "hidden": hidden, "umap": umap}
    return seen
