"""Hand-made reasoners whose inside is known: each latent is a one-hot of the value reached so far.

Questions are chains of sums on a dial, ` 3+2+4`; a state is a vector with an entry a token. All
inputs lie in the cache (its keys), so that a state is a function of everything read.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import SPECIAL_TOKENS
from latent_reasoning.inside.reasoning import Subject
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from tests.model.models import ANSWER, EOS, build_base

MODULUS = 7
DIGITS = [f" {value}" for value in range(MODULUS)]
OPERATIONS = [f"+{value}" for value in range(MODULUS)]
WORDS = ["<bos>", "<eos>", *DIGITS, *OPERATIONS, *ANSWER[:2]]
SIZE = len(WORDS) + len(SPECIAL_TOKENS)
SHARP = 50.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: digits with their space, operations, the words of an answer."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<bos>"))
    kept = Regex(r" The answer is|:|\+\d| \d")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(kept, behavior="removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    fast.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return fast


class OneHot(LatentReasoner):
    """Reads ` 3+2+4`, carries one value a latent step, stops before the last and answers.

    `constant`: whatever it reads, every state is the same, and so is every answer. `slips`: where
    the question begins with 0, the first value is one too high, and all after it follows from that.
    """

    def __init__(self, constant: bool = False, slips: bool = False) -> None:
        base = build_base(vocabulary=SIZE)
        start, end, step, stop = (len(WORDS) + i for i in range(4))
        super().__init__(base, LatentSettings(start, end, step, stop, "none"))
        self.constant, self.slips = constant, slips
        self.eval()

    def embed(self, input_ids):
        return nn.functional.one_hot(input_ids, SIZE).double()

    def vocabulary_logits(self, hidden):
        return SHARP * hidden

    def stop_logits(self, hidden):
        return SHARP * hidden[..., [self.settings.continue_id, self.settings.stop_id]]

    def branch(self, state, order, mask):
        return state.select(order.rows, mask)

    def _advance(self, state, inputs_embeds, mask=None, *, first_read=0, **_):
        width = inputs_embeds.shape[1]
        if mask is None:
            mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool)
        state.mask = torch.cat([state.mask, mask], 1)
        keys, _ = state.cache.update(inputs_embeds[:, None], inputs_embeds[:, None], 0)
        hidden = torch.zeros_like(inputs_embeds)
        for row, (inputs, seen) in enumerate(zip(keys[:, 0], state.mask, strict=True)):
            for column in range(len(seen) - width, len(seen)):
                if seen[column]:
                    ids = inputs[: column + 1][seen[: column + 1]].argmax(-1).tolist()
                    place = column - len(seen) + width
                    hidden[row, place, self._says(ids)] = 1
        hidden = hidden[:, first_read:]
        state.last_hidden = hidden[:, -1] if hidden.shape[1] else None
        return hidden, None

    def _says(self, ids: list[int]) -> list[int]:
        """The tokens that the state after `ids` names."""
        settings, first = self.settings, WORDS.index(" 0")
        if settings.start_id not in ids:
            return [EOS]
        start = ids.index(settings.start_id)
        if self.constant:
            return [first + 3, settings.stop_id if len(ids) - start > 3 else settings.continue_id]
        question, after = [WORDS[i] for i in ids[:start]], ids[start + 1 :]
        amounts = [int(word[1:]) for word in question[1:]]
        values = [i for i in after if first <= i < first + MODULUS]
        value = values[-1] - first if values else int(question[0])
        if settings.stop_id not in after:
            taken = len(after)
            decision = settings.stop_id if taken >= len(amounts) - 1 else settings.continue_id
            slip = self.slips and not taken and value == 0
            return [first + (value + (amounts[taken:] or [0])[0] + slip) % MODULUS, decision]
        if ids[-1] != WORDS.index(":"):
            return [EOS]
        taken = after.index(settings.stop_id)
        return [first + (value + sum(amounts[taken:])) % MODULUS]


def subject(**options: bool) -> Subject:
    """A hand-made model and its tokenizer."""
    return Subject(OneHot(**options), build_tokenizer(), "", batch=7)


def rows(count: int = 40, most: int = 4) -> list[Row]:
    """Chains of 1 to `most` sums."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        draw = torch.randint(MODULUS, (2 + i % most,), generator=generator).tolist()
        value, steps = draw[0], []
        for amount in draw[1:]:
            after = (value + amount) % MODULUS
            steps.append(f"<<({value}+{amount})%{MODULUS}={after}>>")
            value = after
        question = f" {draw[0]}" + "".join(f"+{amount}" for amount in draw[1:])
        made.append(Row(f"test-{i}", question, tuple(steps), str(value)))
    return made
