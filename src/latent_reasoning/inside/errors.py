"""Where errors enter: the first value of a row that its latents hold wrongly.

v_m (m < K) is read from h_(m-1) as in `lens`, its likeliest word. Where that is another number, the
row's own remaining operations imply an answer (`equations.counterfactual`): if the row gives
exactly this one, the error was in the latents, and all after it was right.
"""

from __future__ import annotations

import numpy
import pandas
from torch import Tensor

from latent_reasoning.data.context import decode
from latent_reasoning.data.numbers import read_number
from latent_reasoning.inside.equations import counterfactual, is_chain
from latent_reasoning.inside.interventions import hits_and_chance
from latent_reasoning.inside.lens import value_tokens
from latent_reasoning.inside.reasoning import Reasoning, Subject
from latent_reasoning.inside.statistics import by_operations, share

ANY = 0
"""Stands for all m in `entered` of `error_shares`: whether any value is read wrong."""


def first_errors(subject: Subject, reasoning: Reasoning, tokens: Tensor) -> pandas.DataFrame:
    """A line a row with a value m < K within its steps: `row, operations, answer, correct, entered`
    (the first m that is read wrong; K: none), `implied` (the answer that follows from what is read;
    None where there is none, or it is the right one). `tokens` are those of `read_words`."""
    wanted, _ = value_tokens(subject, reasoning)
    own, lines = reasoning.own, []
    for i, equations in enumerate(reasoning.equations):
        seen = range(1, min(len(equations), int(reasoning.steps[i]) + 2))
        if not seen:
            continue
        wrong = [m for m in seen if int(tokens[i, m - 1, 0]) != int(wanted[i, m - 1])]
        implied = None
        if wrong and is_chain(equations):
            value = read_number(decode(subject.tokenizer, [int(tokens[i, wrong[0] - 1, 0])]))
            if value is not None:
                implied = counterfactual(equations, wrong[0], value)
        line = {"row": i, "operations": len(equations), "answer": own["answer"][i]}
        line |= {"correct": bool(own["correct"][i]), "entered": (*wrong, len(equations))[0]}
        lines.append(line | {"implied": None if implied == equations[-1].value else implied})
    columns = ["row", "operations", "answer", "correct", "entered", "implied"]
    return pandas.DataFrame(lines, columns=columns).astype({"implied": object})


def error_shares(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Of the rows whose answer is right or wrong (`answers`), with K `operations` (0: all), the
    share in which the first value read wrong is `entered` (K: none is; 0: any m < K): `n, correct,
    accuracy, low, high`. And among those that imply an answer, the share that gives exactly it:
    `follows_n, follows_accuracy, follows_low, follows_high`, and by `chance`, as in
    `interventions.counterfactual_shares`.
    """
    lines = []
    for answers, right in (("right", True), ("wrong", False)):
        of_answers = rows[rows["correct"] == right]
        for k, group in by_operations(of_answers) if len(of_answers) else ():
            for m in range(1, k + 1) if k else (ANY,):
                entered = group["entered"]
                inside = (entered == m if m else entered < group["operations"]).to_numpy()
                implying = group[inside & group["implied"].notna().to_numpy()]
                hits, chance = hits_and_chance(
                    implying["answer"].tolist(), implying["implied"].tolist()
                )
                line = {"answers": answers, "operations": k, "entered": m, **share(inside)}
                line |= {f"follows_{name}": value for name, value in share(hits).items()}
                lines.append(line | {"chance": chance.mean() if len(chance) > 1 else numpy.nan})
    return pandas.DataFrame(lines, columns=None if lines else ["answers", "operations", "entered"])
