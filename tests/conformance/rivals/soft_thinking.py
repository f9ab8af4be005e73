"""Cases of `soft_thinking/`: single steps, and whole texts with their mixtures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latent_reasoning.model.mixtures import Mixture, drawn, truncated
from latent_reasoning.model.soft_thinking import (
    SoftRows,
    SoftStep,
    SoftThinking,
    read_mixture,
)
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"B", "sharp"}
"""Number of rows, and what the recorded logits were multiplied by already."""
STEP, TEXT = Tolerance(absolute=1e-5), Tolerance(absolute=1e-4)


NEVER, NOTHING = -2, 1e-7
"""An id that no row has, and what a probability is at least that counts as one."""


def _settings(entry: Record, end: int, scale: float = 1.0) -> SoftThinking:
    """A case's settings; the public code multiplies logits by `scale` before all else."""
    return SoftThinking(
        end=(end,),
        temperature=entry["temperature"] / scale,
        size=entry["max_topk"],
        top_k=entry["top_k"],
        top_p=entry["top_p"],
        min_p=entry["min_p"],
        sure_below=entry.get("entropy", 0.0),
        patience=entry.get("length", 1),
    )


@dataclass(frozen=True)
class _SampledRows(SoftRows):
    """Rows whose answers are drawn by uniform numbers (R,), at the temperature of thinking."""

    entry: Record | None = None
    uniforms: Tensor | None = None

    def answer(self, probabilities: Tensor) -> Tensor:
        cut = {key: self.entry[f"after_{key}"] for key in ("top_k", "top_p", "min_p")}
        return drawn(truncated(probabilities, **cut), self.uniforms)


def _mixtures(steps: list[Mixture], size: int) -> dict[str, Tensor]:
    """Probabilities in falling order, and the ids of those that are not 0."""
    probabilities = torch.cat([step.probabilities for step in steps])
    ids = torch.cat([step.ids for step in steps])
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    probabilities, ids = probabilities[:, :size], ids.gather(-1, order)[:, :size]
    return {"topk_probs": probabilities, "topk_ids": torch.where(probabilities > NOTHING, ids, 0)}


def _recorded(arrays: Record) -> dict[str, Tensor]:
    probabilities, ids = arrays["topk_probs"], arrays["topk_ids"]
    return {"topk_probs": probabilities, "topk_ids": torch.where(probabilities > NOTHING, ids, 0)}


class _GivenLogits:
    """A model that has recorded logits for states."""

    def __init__(self, logits: Tensor) -> None:
        self.given = logits

    def logits(self, hidden: Tensor) -> Tensor:
        return self.given.clone()


def _sampler(vectors: Vectors, entry: Record, name: str) -> Checks:
    """One step of rows that think and of rows that answer."""
    file = vectors.file(f"soft_thinking/sampler_{name}.npz")
    arrays = {key: file[key] for key in file}
    logits, thinking = arrays["logits"], arrays["soft"]
    yield Check(thinking, entry["soft"], part="soft")
    settings = _settings(entry, NEVER)
    rows = SoftRows.begin(settings, torch.zeros(len(logits), 1), torch.ones(len(logits), 1))
    parts = thinking, rows.sure, rows.last, rows.written
    rows = _SampledRows(settings, *parts, entry, arrays["u"])
    step, _ = rows.choose(_GivenLogits(logits), logits)
    mixture = step.mixture
    if "gumbel" in entry:
        noisy = mixture.perturbed(-arrays["exponential"].log(), entry["gumbel"])
        probabilities = torch.where(thinking[:, None], noisy.probabilities, mixture.probabilities)
        mixture = Mixture(probabilities, mixture.ids)
    own = _mixtures([mixture], entry["max_topk"])
    model = vectors.model("soft_thinking/model")
    yield Check(own, _recorded(arrays), STEP, "mixtures")
    yield Check(step.entropy, arrays["entropy"], STEP, "entropy")
    token = torch.where(thinking, own["topk_ids"][:, 0], step.token)
    yield Check(token, arrays["token"].long(), part="tokens")
    yield Check(read_mixture(model, mixture), arrays["embedding"], STEP, "embedding")


def _text(vectors: Vectors, entry: Record, name: str) -> Checks:
    """A whole text, up to where the public code aborts: ours has no such end."""
    arrays, ids = (
        vectors.file(f"soft_thinking/gen_{name}.npz"),
        vectors.file("soft_thinking/expected.json")["ids"],
    )
    model, expected = vectors.model("soft_thinking/model"), entry["output_ids"]
    settings = _settings(entry, ids["end_think"], entry["scale"])
    steps, fed = _write(model, settings, arrays, entry, ids["eos"])
    tokens = [int(step.token) for step in steps]
    aborted = _aborted_after(steps, entry, ids["end_think"])
    yield Check(aborted is not None, entry["aborted"], part="aborted")
    tokens, steps, fed = tokens[:aborted], steps[:aborted], fed[:aborted]
    yield Check(tokens, expected, part="tokens")
    yield Check(arrays["output_ids"].tolist(), expected, part="tokens")
    thinking = torch.cat([step.thinking for step in steps])
    yield Check(thinking, arrays["soft"], part="soft")
    yield Check(int(thinking.sum()), entry["soft_steps"], part="soft")
    yield Check(torch.cat([step.entropy for step in steps]), arrays["entropy"], TEXT, "entropy")
    mixtures = _mixtures([step.mixture for step in steps], entry["max_topk"])
    yield Check(mixtures, _recorded(arrays), TEXT, "mixtures")
    yield Check(torch.cat(fed), arrays["fed"], TEXT, "fed")


@torch.no_grad()
def _write(
    model: object, how: SoftThinking, arrays: Record, entry: Record, eos: int
) -> tuple[list[SoftStep], list[Tensor]]:
    """Write one row, as the product's own writer does, but with sampled answers."""
    prompt = arrays["prompt_ids"][None]
    mask = torch.ones_like(prompt)
    state, rows = model.read_prompts(prompt, mask), _SampledRows.begin(how, prompt, mask)
    draws, steps, fed = arrays["u"], [], []
    for number in range(entry["maxn"]):
        # Numbers end where the public code does.
        uniforms = draws[min(number, len(draws) - 1)][None]
        rows = replace(rows, entry=entry, uniforms=uniforms)
        step, rows = rows.choose(model, state.last_hidden)
        steps.append(step)
        fed.append(read_mixture(model, step.mixture))
        if int(step.token) == eos:
            break
        model.advance(state, fed[-1][:, None])
    return steps, fed


def _aborted_after(steps: list[SoftStep], entry: Record, end: int) -> int | None:
    """After how many tokens the public code aborts: it goes on to count sure tokens while
    answering. None: it does not."""
    sure = 0
    for number, step in enumerate(steps):
        sure = sure + 1 if float(step.entropy) < entry["entropy"] else 0
        if sure >= entry["length"]:
            if not step.thinking:
                return number + 1
            sure = 0
    return None


READERS = {
    r"soft_thinking/expected\.json": {
        "sampler/(.+)": _sampler,
        "generation/(.+)": _text,
    },
}
