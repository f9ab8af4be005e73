"""A. Reading the latents: the logit lens, softmax(W_out h_j), and the page's examples of it.

Impossible tokens (CONTINUE, STOP, END) are left out, as where text is written. A latent is *read*
as v_m where the first token of v_m is its likeliest token (top-1), or among the five likeliest.
The control reads the same latents for the values of another row with as many equations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy
import pandas
import torch
from torch import Tensor

from latent_reasoning.data.context import decode
from latent_reasoning.inside.capture import Anatomy
from latent_reasoning.inside.chain import Chain
from latent_reasoning.inside.reasoning import Reasoning, Subject
from latent_reasoning.inside.statistics import share
from latent_reasoning.model.passes import Kind

WORDS = 10
"""Likeliest tokens that are kept of each state."""
SHOWN = 5
"""Of these, those of the page's examples."""
ROLES = {
    "all": lambda operations, m: operations >= m,
    "intermediate": lambda operations, m: operations > m,
    "answer": lambda operations, m: operations == m,
}
"""Rows, by K, in which v_m counts."""
AT_ONCE = 2**24
"""Logits in memory at once."""
COLUMNS = ("answers", "role", "value", "step", "reading", "n", "correct", "accuracy", "low", "high")


@torch.no_grad()
def word_probabilities(subject: Subject, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The `WORDS` likeliest tokens (.., 10) of states (.., d), their probabilities, and the entropy
    (..) in nats."""
    model, flat = subject.model, hidden.reshape(-1, hidden.shape[-1])
    size = max(1, AT_ONCE // model.base.config.vocab_size)
    parts = []
    for part in flat.split(size):
        part = part.to(model.device, model.base.dtype)
        kinds = torch.full(part.shape[:1], int(Kind.TEXT), device=model.device)
        log_probs = model.logits(part, kinds).float().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e9)).sum(-1)
        best = log_probs.topk(min(WORDS, log_probs.shape[-1]), -1)
        parts.append([x.cpu() for x in (best.indices, best.values.exp(), entropy)])
    tokens, probabilities, entropy = (
        torch.cat(part).unflatten(0, hidden.shape[:-1]) for part in zip(*parts, strict=True)
    )
    return tokens, probabilities, entropy


def read_words(subject: Subject, reasoning: Reasoning) -> tuple[Tensor, pandas.DataFrame]:
    """The likeliest tokens (N, J + 1, 10) of each latent, and a table of those that rows made.

    `id, step, rank, token, probability, entropy, p_stop`.
    """
    tokens, probabilities, entropy = word_probabilities(subject, reasoning.hidden)
    made = torch.arange(tokens.shape[1]) <= reasoning.steps[:, None]
    row, step = (place.numpy().repeat(tokens.shape[-1]) for place in made.nonzero(as_tuple=True))
    texts = {i: decode(subject.tokenizer, [i]) for i in tokens[made].unique().tolist()}
    ids = numpy.array([r.id for r in reasoning.rows], dtype=object)
    rank = numpy.tile(numpy.arange(1, tokens.shape[-1] + 1), int(made.sum()))
    return tokens, pandas.DataFrame(
        {
            "id": ids[row],
            "step": step,
            "rank": rank,
            "token": [texts[i] for i in tokens[made].flatten().tolist()],
            "probability": probabilities[made].flatten().numpy(),
            "entropy": entropy[made].numpy().repeat(tokens.shape[-1]),
            "p_stop": reasoning.stops[made].numpy().repeat(tokens.shape[-1]),
        }
    )


def lens_matrix(subject: Subject, reasoning: Reasoning, tokens: Tensor) -> pandas.DataFrame:
    """How often v_m is read at step j: `answers` (right, wrong), `role` (all; intermediate, m < K;
    answer, m = K), `value` m, `step` j, `reading` (top1, top5, control_top1, control_top5), and
    `accuracy`, the share among the rows that take at least j steps. The table is empty where no row
    states equations.
    """
    wanted, control = value_tokens(subject, reasoning)
    right = torch.tensor(reasoning.own["correct"].tolist())
    lines = []
    for m in range(1, wanted.shape[1] + 1):
        roles = {role: test(reasoning.operations, m) for role, test in ROLES.items()}
        for j in range(int(reasoning.steps.max()) + 1):
            known = (wanted[:, m - 1] >= 0) & (control[:, m - 1] >= 0) & (reasoning.steps >= j)
            hits = {
                f"{reading}top{top}": (tokens[:, j, :top] == value[:, m - 1, None]).any(1)
                for reading, value in (("", wanted), ("control_", control))
                for top in (1, 5)
            }
            for (role, fits), name in itertools.product(roles.items(), ("right", "wrong")):
                rows = known & fits & (right if name == "right" else ~right)
                where = {"answers": name, "role": role, "value": m, "step": j}
                for reading, hit in hits.items():
                    lines.append(where | {"reading": reading} | share(hit[rows].numpy()))
    return pandas.DataFrame(lines, columns=[*COLUMNS])


def value_tokens(subject: Subject, reasoning: Reasoning) -> tuple[Tensor, Tensor]:
    """The first token of each row's values (N, K max), -1 where it has none, and of another's."""
    most = max(map(len, reasoning.equations), default=0)
    texts = sorted({e.result for equations in reasoning.equations for e in equations})
    token = dict(zip(texts, subject.value_tokens(texts), strict=True))
    wanted = torch.full((len(reasoning.rows), most), -1)
    for row, equations in zip(wanted, reasoning.equations, strict=True):
        row[: len(equations)] = torch.tensor([token[e.result] for e in equations])
    others = other_rows([len(e) for e in reasoning.equations])
    control = wanted[others]
    control[others == torch.arange(len(others))] = -1
    return wanted, control


def other_rows(operations: Sequence[int]) -> Tensor:
    """For each row the next one with as many equations, the first after the last."""
    others = torch.arange(len(operations))
    for count in set(operations):
        rows = torch.tensor([i for i, k in enumerate(operations) if k == count])
        others[rows] = rows.roll(-1)
    return others


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
        tokens, probabilities, _ = word_probabilities(subject, anatomy.final_norm(stream))
        words, shares, entropy = word_probabilities(subject, reasoning.hidden[i, : n + 1])
        answers = reasoning.forced[reasoning.forced["row"] == i].to_dict("records")
        steps = [
            {
                "words": _words(subject, words[j, :SHOWN], shares[j]),
                "entropy": round(float(entropy[j]), 3),
                "p_stop": round(float(reasoning.stops[i, j]), 4),
                "blocks": _words(subject, tokens[j, :, 0], probabilities[j, :, 0]),
                "answer": answer["answer"] if isinstance(answer["answer"], str) else None,
                "right": answer["correct"],
            }
            for j, answer in enumerate(answers[: n + 1])
        ]
        equations = list(row.steps or ())
        line = {"id": row.id, "question": row.question, "equations": equations}
        made.append(line | {"expected": row.answer, "stops": n, "steps": steps})
    return made


def _words(subject: Subject, tokens: Tensor, probabilities: Tensor) -> list:
    """Each token's text and its probability, of which there may be more."""
    texts = [decode(subject.tokenizer, [token]) for token in tokens.tolist()]
    return [[text, round(p, 4)] for text, p in zip(texts, probabilities.tolist(), strict=False)]
