"""Which text a latent input stands for, for a decoder that has to write it (SIM-CoT).

Pure functions on token ids. A row gets a list of texts, one for each of its first latent inputs or
groups of them; an empty text is not learnt. Source: arXiv 2509.20317 and its public code, without
the cut of all rows to the length of the first one's steps.
"""

from __future__ import annotations

from collections.abc import Sequence


def texts_of_inputs(steps: Sequence[Sequence[int]], inputs: int, eos_id: int) -> list[list[int]]:
    """A step for each of `inputs` latent inputs, of which a fixed number follows a row (CODI).

    More steps than inputs: the last input stands for all the rest. Fewer: the inputs after them
    stand for nothing. Each text ends with EOS.
    """
    if len(steps) > inputs:
        rest = [token for step in steps[inputs - 1 :] for token in step]
        steps = [*steps[: inputs - 1], rest]
    return [[*step, eos_id] for step in steps]


def texts_of_groups(
    removed: Sequence[Sequence[int]],
    remaining: Sequence[int],
    groups: int,
    *,
    separator: Sequence[int],
    eos_id: int,
) -> list[list[int]]:
    """A removed step for each of `groups` groups of latent inputs that replace them (Coconut).

    More steps than groups: the last group stands for all the rest, with the `separator` between
    them. Fewer: each group after them stands for the row's `remaining` text, without its EOS.
    """
    texts = [list(step) for step in removed[:groups]]
    if texts:
        for step in removed[groups:]:
            texts[-1] += [*separator, *step]
    texts += [list(remaining)] * (groups - len(texts))
    return [[*text, eos_id] for text in texts]
