"""The page's browsable examples: a row's latents in words, block by block, and what it answered."""

from __future__ import annotations

from typing import Any

import torch

from latent_reasoning.data.context import decode
from latent_reasoning.inside.capture import Anatomy
from latent_reasoning.inside.chain import Chain
from latent_reasoning.inside.lens import word_probabilities
from latent_reasoning.inside.reasoning import Reasoning, Subject

SHOWN = 5
"""Words shown of each latent."""


@torch.no_grad()
def examples_of(
    subject: Subject, reasoning: Reasoning, chain: Chain, anatomy: Anatomy, count: int
) -> list[dict[str, Any]]:
    """The first rows: `id, question, equations, expected, stops` and a `steps` entry each, with
    `words` (text, probability), `entropy, p_stop, blocks` (the likeliest word after each block, and
    its probability), `answer` if it stopped here, `right`."""
    model, made = subject.model, []
    for i, row in enumerate(reasoning.rows[:count]):
        n = int(reasoning.steps[i])
        stream = chain.latents[i, : n + 1, :-1].to(model.device, model.base.dtype)
        by_block = word_probabilities(subject, anatomy.final_norm(stream))
        words = word_probabilities(subject, reasoning.hidden[i, : n + 1])
        answers = reasoning.forced[reasoning.forced["row"] == i]
        steps = []
        for j in range(n + 1):
            answer = answers.iloc[j]
            steps.append(
                {
                    "words": _words(subject, words[0][j], words[1][j], SHOWN),
                    "entropy": round(float(words[2][j]), 3),
                    "p_stop": round(float(reasoning.stops[i, j]), 4),
                    "blocks": [
                        _words(subject, best, shares, 1)[0]
                        for best, shares in zip(by_block[0][j], by_block[1][j], strict=True)
                    ],
                    "answer": answer["answer"] if isinstance(answer["answer"], str) else None,
                    "right": bool(answer["correct"]),
                }
            )
        made.append(
            {
                "id": row.id,
                "question": row.question,
                "equations": list(row.steps or ()),
                "expected": row.answer,
                "stops": n,
                "steps": steps,
            }
        )
    return made


def _words(subject: Subject, tokens: torch.Tensor, probabilities: torch.Tensor, count: int) -> list:
    pairs = zip(tokens.tolist()[:count], probabilities.tolist(), strict=False)
    return [[decode(subject.tokenizer, [token]), round(p, 4)] for token, p in pairs]
