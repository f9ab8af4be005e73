"""Cases of `cot2/`: continuous supervised fine-tuning and multi-token sampling, with gradients."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from latent_reasoning.model.given import read_given
from latent_reasoning.model.mixtures import Mixture
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.special_rows import vocabulary_logits
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.rivals.csft import aligned
from latent_reasoning.rivals.mixture_sft import (
    Steps,
    counted,
    mixture_kl,
    with_mixtures,
)
from latent_reasoning.rivals.mts import StepPolicy, group_advantages, mean_embeddings
from latent_reasoning.rl.grpo import policy_loss
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors
from tests.conformance.rivals.latent_sft import gradients, recorded_gradients

INFORMATION: set[str] = set()
LOSS = Tolerance(absolute=5e-6)
GRADIENT = Tolerance(relative=1e-4, by_norm=True)
PROBABILITY = Tolerance(absolute=1e-6)
UNUSED_IDS = (16, 17, 18, 19)
"""Ids that no prompt holds, for the special tokens of a latent reasoner that reads none of them."""
LAST = "h"
"""The name of the term of the last token."""


# -------------------------------------------------------------------------------------------- CSFT


def _csft(vectors: Vectors, entry: Record, name: str) -> Checks:
    arrays = vectors.file(f"cot2/csft_{name}.npz")
    vocabulary = list(vectors.file("cot2/expected.json")["vocabulary"])
    model = vectors.model("cot2/model")
    prompts, digits = arrays["prompt_ids"], entry["digits"]
    words = [["<BOS>", *(f"D{digit}" for digit in row)] for row in digits]
    own = torch.tensor([[vocabulary.index(word) for word in row] for row in words])
    yield Check(own, prompts, part="prompts")
    beams = entry["beams"]
    yield Check(beams is not None, entry["strategy"] == "beam_minabs", part="targets")
    kept = [_paths(row, beams) for row in digits]
    traces = [[[vocabulary.index(f"S{s}") for s in path] for path in paths] for paths in kept]
    steps = len(digits[0])
    targets = [counted(aligned(row, steps, after=-1)) for row in traces]
    dense = torch.stack([_dense(target, len(vocabulary)) for target in targets])
    yield Check(dense, arrays["target_probs"], PROBABILITY, "targets")
    finals = [min(path[-1] for path in paths if path[-1] >= 0) for paths in kept]
    finals = torch.tensor([vocabulary.index(f"S{final}") for final in finals])
    yield Check(finals, arrays["final_label"], part="targets")
    before = prompts.shape[1] - 1
    hidden = _states(model, prompts, dense[:, : steps - 1], entry["teacher"])
    terms = {}
    for step in range(steps - 1):
        terms[str(step)] = mixture_kl(model, hidden[:, before + step], _mixture(dense[:, step]))
    certain = Mixture(torch.ones(len(finals), 1), finals[:, None])
    terms[LAST] = mixture_kl(model, hidden[:, before + steps - 1], certain)
    loss = sum(terms[term].mean() for term in entry["steps"])
    yield Check(loss, entry["loss"], LOSS, "loss")
    loss.backward()
    yield Check(gradients(model), recorded_gradients(arrays, "grad/"), GRADIENT, "gradients")


def _paths(digits: list[int], beams: int | None) -> list[list[int]]:
    """Partial sums of all signed sums, or of the `beams` whose ends are nearest 0."""
    signs = itertools.product((1, -1), repeat=len(digits))
    paths = [
        (list(itertools.accumulate(s * d for s, d in zip(sign, digits, strict=True))), sign)
        for sign in signs
    ]
    if beams is not None:
        paths.sort(key=lambda item: (abs(item[0][-1]), item[0][-1] < 0, item[0][-1], item[1]))
    return [path for path, _ in paths[:beams]]


def _dense(target: tuple, size: int) -> Tensor:
    probabilities, ids = map(torch.from_numpy, target)
    return torch.zeros(len(ids), size).scatter_add(1, ids.long(), probabilities)


def _mixture(probabilities: Tensor) -> Mixture:
    """All words of distributions (.., V)."""
    ids = torch.arange(probabilities.shape[-1]).expand_as(probabilities)
    return Mixture(probabilities, ids)


def _states(model: LatentReasoner, prompts: Tensor, targets: Tensor, teacher: str) -> Tensor:
    """States (B, T, d) of prompts (B, P) and latent steps that read targets (B, n, V), or the
    model's own mixtures."""
    rows, steps = targets.shape[:2]
    if teacher == "hard_teacher":
        ids = torch.cat([prompts, torch.zeros(rows, steps, dtype=torch.long)], 1)
        is_step = torch.arange(ids.shape[1]).expand_as(ids) >= prompts.shape[1]
        mixture = _mixture(targets.flatten(0, 1))
        places = Steps(*is_step.nonzero(as_tuple=True), mixture, torch.ones(rows * steps))
        inputs = with_mixtures(model, model.embed(ids), places)
        return read_given(model, inputs, torch.ones_like(ids, dtype=torch.bool))
    reasoner = LatentReasoner(model.base, LatentSettings(*UNUSED_IDS, recurrent_filter="SRE"))
    trajectory = Trajectory.begin(reasoner, prompts.tolist())
    trajectory.extend(reasoner, steps)
    hidden = torch.stack(trajectory.hidden, 1)
    before = torch.zeros(rows, prompts.shape[1] - 1, hidden.shape[-1])
    return torch.cat([before, hidden], 1)


# --------------------------------------------------------------------------------------------- MTS


def _mts(vectors: Vectors, entry: Record, name: str) -> Checks:
    arrays = vectors.file(f"cot2/mts_{name}.npz")
    old, new = vectors.model("cot2/model"), vectors.model("cot2/model")
    prompts, words, finals = arrays["prompt_ids"], arrays["tokens"], arrays["final_tokens"]
    yield Check(list(words.shape[1:]), [entry["group"], words.shape[2], entry["K"]], part="words")
    with torch.no_grad():
        for key, parameter in new.named_parameters():
            parameter += arrays[f"delta/{key.removeprefix('base.')}"]
    rewards = (finals == arrays["labels"][:, None]).float()
    yield Check(rewards, entry["rewards"], part="rewards")
    ratio = "divided_logits" if entry["sampling_normalization"] else "root"
    policy = StepPolicy(entry["K"], ratio)
    rows = words.flatten(0, 1)
    ids = prompts.repeat_interleave(entry["group"], 0)
    latents = mean_embeddings(new, rows)
    inputs = torch.cat([new.embed(ids), latents], 1)
    log_probs = _score(new, policy, inputs, rows, finals.flatten())
    with torch.no_grad():
        # The public code feeds the old policy with the new one's mixtures.
        inputs = torch.cat([old.embed(ids), latents], 1)
        before = _score(old, policy, inputs, rows, finals.flatten())
    result = policy_loss(
        log_probs,
        group_advantages(rewards).flatten(),
        torch.ones_like(log_probs),
        kind="grpo",
        epsilon=entry["clip"],
        kl_weight=0.0,
        max_completion_length=log_probs.shape[1],
        old_log_probs=before,
    )
    difference = before - log_probs.detach()
    # The public code's KL term has a value, but no gradient.
    kl = (difference.exp() - difference - 1).mean()
    yield Check(result.loss + entry["kl"] * kl, entry["loss"], LOSS, "loss")
    result.loss.backward()
    yield Check(gradients(new), recorded_gradients(arrays, "grad/"), GRADIENT, "gradients")


def _score(
    model: LatentReasoner, policy: StepPolicy, inputs: Tensor, words: Tensor, finals: Tensor
) -> Tensor:
    """Log-probabilities (R, n + 1) of the latent steps and of the last token."""
    steps = words.shape[1]
    hidden = read_given(model, inputs, torch.ones(inputs.shape[:2], dtype=torch.bool))
    latent = policy.score(model, hidden[:, -steps - 1 : -1], words)
    logits = vocabulary_logits(model.base, None, None, hidden[:, -1])
    return torch.cat([latent, logits.log_softmax(-1).gather(-1, finals[:, None])], 1)


READERS = {
    r"cot2/expected\.json": {
        "csft/(.+)": _csft,
        "mts/(.+)": _mts,
    },
}
