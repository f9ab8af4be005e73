"""Cases of `latentseek/`: the optimisation of an answer with given rewards, verdicts, their reward.

The public verifiers are prompts to the model itself, beyond a small one: verdicts and their
weighted sum are in this file alone, and ours is another stand-in (docs/rivals.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from latent_reasoning.evaluation.latentseek import verifiers_reward
from latent_reasoning.model.generation import generate
from latent_reasoning.model.latentseek import Search, SeekSettings, answer_states
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"eos_forced_at"}
STATE, HIDDEN = Tolerance(absolute=1e-4), Tolerance(absolute=1e-5)
LOSS, REWARD = Tolerance(absolute=1e-4, relative=1e-4), Tolerance(absolute=1e-6)
GRADIENT = Tolerance(absolute=1e-8, relative=1e-3, by_norm=True)
EOS = 1
PHRASE = "final verification answer is:"
WEIGHTS = {
    "calculation_check": 2,
    "answer_correct": 1,
    "answer_completeness": 2,
    "understanding_check": 1,
}
FORMAT_WEIGHT, TOTAL = 2, 6


def _search(vectors: Vectors, entry: Record, kind: str) -> Checks:
    arrays, model = vectors.file(f"latentseek/opt_{kind}.npz"), vectors.model("latentseek/model")
    prompt, answer = (arrays[name].tolist() for name in ("prompt_ids", "original_ids"))
    (states,) = answer_states(model, [prompt], [answer])
    yield Check(states, arrays["original_hidden"], STATE, "states")
    # The public loop counts one token more.
    longest = entry["max_new_tokens"] + 1
    rewards: Iterator[float] = iter(entry["rewards_given"])
    search = Search(
        model,
        [prompt],
        [answer],
        SeekSettings(
            share=entry["k"],
            learning_rate=entry["lr"],
            steps=entry["max_steps"],
            threshold=entry["threshold"],
            max_grad_norm=entry["grad_clip"],
        ),
        lambda texts: [
            generation.ids
            for generation in generate(
                model, texts, max_new_tokens=longest, eos_id=EOS, batch_size=1
            )
        ],
        lambda rows, _: torch.tensor([next(rewards) for _ in rows]),
    )
    yield Check(entry["start_index"], 0, part="settings")
    hidden, gradients, losses, steps = [], [], [], 0
    while search.open:
        search.step()
        steps += 1
        hidden.append(search.hidden.detach()[0].clone())
        gradients.append(search.gradients[0].clone())
        losses.append(search.losses.item())
        yield Check(search.answers[0], arrays[f"answer_{steps}"].tolist(), part="answers")
    lengths = {"original_length": len(answer), "update_length": search.counts[0]}
    lengths |= {"steps_done": steps}
    # The public code gives no new answer where nothing is optimised.
    lengths["optimised_length"] = len(search.answers[0]) if search.counts[0] else 0
    yield Check(lengths, {key: entry[key] for key in lengths}, part="lengths")
    yield Check(search.answers[0], arrays["final_ids"].tolist(), part="answers")
    yield Check(search.history[0], list(entry["reward_history"]), REWARD, "rewards")
    yield Check(losses, list(entry["losses"]), LOSS, "losses")
    if steps:
        yield Check(_stacked(hidden), arrays["hidden"], HIDDEN, "hidden")
        yield Check(_stacked(gradients), arrays["grads"], GRADIENT, "gradients")


def _stacked(steps: list[Tensor]) -> Tensor:
    return torch.stack(steps)


def _verdict(_: Vectors, case: Record) -> Checks:
    """`true` anywhere after the last of the phrases."""
    _, phrase, after = case["text"].lower().rpartition(PHRASE)
    yield Check(bool(phrase) and "true" in after, case["approved"])


def _reward(_: Vectors, case: Record) -> Checks:
    weights, approved = list(WEIGHTS.values()), [case["verdicts"][name] for name in WEIGHTS]
    if case.get("format"):
        weights, approved = [*weights, FORMAT_WEIGHT], [*approved, "\\boxed" in case["solution"]]
    own = verifiers_reward(torch.tensor(approved), torch.tensor(weights), TOTAL)
    yield Check(own, case["reward"], REWARD)


READERS = {
    r"latentseek/expected\.json": {
        r"optimisation/(.+)": _search,
        r"verdicts/.+": _verdict,
        r"rewards/.+": _reward,
    },
}
