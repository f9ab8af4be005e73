"""The paper's claims, each with the requirement on an experiment and the measurement.

Thresholds are the project's own and stand in the configuration (`report.claims`). A claim whose
requirement is not met is reported as not reached; a claim that the numbers cannot decide is
reported as such.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pandas

from latent_reasoning.analysis.results import Pair, Results
from latent_reasoning.analysis.tables import (
    forced_table,
    length_correlation,
    main_table,
    paired_table,
)
from latent_reasoning.config import Claims
from latent_reasoning.evaluation.metrics import PairedCounts, paired_counts

SIGNIFICANT = 0.05
"""Largest p of a loss that chance does not explain."""


@dataclass(frozen=True)
class Claim:
    """One claim about one model; `reached` is None where the data cannot decide."""

    claim: str
    model: str
    asked: str
    measured: str
    reached: bool | None

    @property
    def verdict(self) -> str:
        return {True: "reached", False: "not reached", None: "cannot be decided"}[self.reached]


def claims_of(results: Results) -> list[Claim]:
    """Every claim that the experiment's models allow, on its first data set."""
    evidence = _Evidence.of(results)
    latent = [m for m in results.models if results.stage(m) in ("latent_sft", "rl")]
    return [
        *(_better_than_no_reasoning(evidence, pair) for pair in results.no_reasoning_pairs()),
        *(_shorter(evidence, pair) for pair in results.rl_pairs()),
        *(_as_accurate(evidence, pair) for pair in results.rl_pairs()),
        *(_as_accurate_by_steps(evidence, pair) for pair in results.rl_pairs()),
        *(_more_than_training(evidence, pair) for pair in results.control_pairs()),
        *(_length_follows_steps(evidence, pair.model) for pair in results.rl_pairs()),
        *(_steps_are_needed(evidence, model) for model in latent),
    ]


def claims_table(results: Results) -> pandas.DataFrame:
    """`claims_of` as a table: claim, model, asked, measured, verdict."""
    columns = ["claim", "model", "asked", "measured", "verdict"]
    rows = [asdict(claim) | {"verdict": claim.verdict} for claim in claims_of(results)]
    return pandas.DataFrame(rows, columns=columns)


@dataclass(frozen=True)
class _Evidence:
    """The tables that the claims read, restricted to one data set."""

    results: Results
    dataset: str
    main: pandas.DataFrame
    paired: pandas.DataFrame
    forced: pandas.DataFrame

    @property
    def asked(self) -> Claims:
        """The thresholds."""
        return self.results.experiment.report.claims

    @classmethod
    def of(cls, results: Results) -> _Evidence:
        dataset = results.datasets[0]
        main, paired, forced = (
            table[table["dataset"] == dataset]
            for table in (main_table(results), paired_table(results), forced_table(results))
        )
        return cls(results, dataset, main.set_index("model"), paired, forced)

    def accuracy(self, model: str) -> float:
        return self.main.loc[model, "accuracy"]

    def accuracy_of_forced_rows(self, model: str) -> float:
        """Accuracy on the rows of the forced curve, which may be fewer."""
        results, rows = self.results, self.results.experiment.evaluation.forced_rows
        if rows is None:
            return self.accuracy(model)
        frames = [results.predictions(model, seed, self.dataset)[:rows] for seed in results.seeds]
        return pandas.concat(frames)["correct"].mean()

    def training_steps(self, model: str) -> int | None:
        """Steps of a model's last training; None where it was brought in."""
        training = getattr(self.results.experiment.models[model], "training", None)
        return None if training is None else training.steps

    def tokens(self, model: str) -> float:
        return self.main.loc[model, "reasoning_tokens"]

    def counts_by_steps(self, pair: Pair) -> dict[int, PairedCounts]:
        """A pair row by row at each number of reasoning steps, the rows of all seeds together."""
        ours, theirs = (
            rows.assign(id=rows["seed"].astype(str) + " " + rows["id"])
            for rows in (
                self.results.pooled_predictions(model, self.dataset).dropna(subset="gold_steps")
                for model in (pair.model, pair.reference)
            )
        )
        return {
            int(steps): paired_counts(own, theirs[theirs["gold_steps"] == steps])
            for steps, own in ours.groupby("gold_steps")
        }

    def p_values(self, pair: Pair) -> str:
        """McNemar's p for each seed."""
        rows = self.paired[
            (self.paired["model"] == pair.model) & (self.paired["reference"] == pair.reference)
        ]
        return "McNemar " + ", ".join(p_text(p) for p in rows["p_mcnemar"])


def _better_than_no_reasoning(evidence: _Evidence, pair: Pair) -> Claim:
    ours, theirs = evidence.accuracy(pair.model), evidence.accuracy(pair.reference)
    bound = evidence.asked.points_above_no_reasoning
    return Claim(
        claim="Latent reasoning beats answering at once",
        model=pair.model,
        asked=f"at least {_points(bound)} above {pair.reference}",
        measured=f"{_percent(ours)} against {_percent(theirs)}, "
        f"{_points(ours - theirs, sign=True)}; {evidence.p_values(pair)}",
        reached=_at_least(ours - theirs, bound),
    )


def _shorter(evidence: _Evidence, pair: Pair) -> Claim:
    before, after = evidence.tokens(pair.reference), evidence.tokens(pair.model)
    change, bound = after / before - 1 if before else 0.0, evidence.asked.shortening
    return Claim(
        claim="RL shortens the reasoning",
        model=pair.model,
        asked=f"at least {100 * bound:g} % fewer reasoning tokens than {pair.reference}",
        measured=f"{before:.2f} to {after:.2f} tokens, {100 * change:+.1f} %",
        reached=_at_least(-change, bound),
    )


def _as_accurate(evidence: _Evidence, pair: Pair) -> Claim:
    before, after = evidence.accuracy(pair.reference), evidence.accuracy(pair.model)
    return Claim(
        claim="RL keeps the accuracy",
        model=pair.model,
        asked=f"at most {_points(evidence.asked.points_lost)} below {pair.reference}",
        measured=f"{_percent(before)} to {_percent(after)}, "
        f"{_points(after - before, sign=True)}; {evidence.p_values(pair)}",
        # A model that answers nothing has no accuracy to keep.
        reached=_at_least(after - before, -evidence.asked.points_lost) if before else None,
    )


def _as_accurate_by_steps(evidence: _Evidence, pair: Pair) -> Claim:
    """A loss counts where it is larger than the bound and than chance would make it."""
    bound, counts = evidence.asked.points_lost_by_steps, evidence.counts_by_steps(pair)
    changes = {k: (c.only_model - c.only_reference) / c.n for k, c in counts.items()}
    shown = [
        f"{k}: {_points(changes[k], sign=True)} ({p_text(c.p_mcnemar)}, n = {c.n:,})"
        for k, c in counts.items()
    ]
    lost = [
        k
        for k, c in counts.items()
        if not _at_least(changes[k], -bound) and c.p_mcnemar < SIGNIFICANT
    ]
    return Claim(
        claim="RL keeps the accuracy at every number of steps",
        model=pair.model,
        asked=f"nowhere more than {_points(bound)} below {pair.reference} with p < {SIGNIFICANT}",
        measured="; ".join(shown) or "the rows have no reasoning steps",
        reached=not lost if counts and evidence.accuracy(pair.reference) else None,
    )


def _more_than_training(evidence: _Evidence, pair: Pair) -> Claim:
    ours, theirs = evidence.accuracy(pair.model), evidence.accuracy(pair.reference)
    rl, further = (evidence.training_steps(model) for model in (pair.model, pair.reference))
    steps = "as many" if rl == further else f"{further:,} (RL: {rl or 'unknown'})"
    return Claim(
        claim="RL gives more than further latent SFT",
        model=pair.model,
        asked=f"no less accurate than {pair.reference}, with {steps} further steps, and shorter",
        measured=f"{_percent(ours)} at {evidence.tokens(pair.model):.2f} tokens against "
        f"{_percent(theirs)} at {evidence.tokens(pair.reference):.2f}; {evidence.p_values(pair)}",
        reached=_at_least(ours, theirs)
        and evidence.tokens(pair.model) < evidence.tokens(pair.reference),
    )


def _length_follows_steps(evidence: _Evidence, model: str) -> Claim:
    results = evidence.results
    frames = [results.predictions(model, seed, evidence.dataset) for seed in results.seeds]
    differ = all(frame["gold_steps"].nunique() > 1 for frame in frames)
    # A length that never varies follows nothing: r = 0.
    correlations = [length_correlation(frame) or 0.0 for frame in frames]
    shown = ", ".join(f"{r:.3f}" for r in correlations)
    mean = sum(correlations) / len(correlations)
    return Claim(
        claim="Longer problems get more thought",
        model=model,
        asked=f"Pearson's r of length and reasoning steps at least {evidence.asked.correlation}",
        measured=f"r = {shown}" if differ else "the rows do not differ in reasoning steps",
        reached=_at_least(mean, evidence.asked.correlation) if differ else None,
    )


def _steps_are_needed(evidence: _Evidence, model: str) -> Claim:
    own, bound = evidence.accuracy_of_forced_rows(model), evidence.asked.points_below_without_steps
    without = evidence.forced.set_index(["model", "latent_steps"])["accuracy"].loc[model, 0]
    return Claim(
        claim="The latent steps do the work",
        model=model,
        asked=f"made to answer after 0 steps, at least {_points(bound)} worse",
        measured=f"{_percent(without)} against {_percent(own)}, "
        f"{_points(without - own, sign=True)}",
        reached=_at_least(own - without, bound),
    )


def _at_least(value: float, bound: float) -> bool:
    """Whether a value reaches its bound, up to rounding of shares (0.98 - 0.97)."""
    return bool(value >= bound - 1e-9)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float, *, sign: bool = False) -> str:
    number = f"{100 * share:+.2f}" if sign else f"{100 * share:g}"
    return f"{number} point{'' if number == '1' else 's'}"


def p_text(p: float) -> str:
    """A p-value with a readable number of digits."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}" if p < 0.01 else f"p = {p:.2f}"
