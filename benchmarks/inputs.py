"""The benchmark's inputs: a random model and generated batches, or a trained model and its rows.

Generated batches have random ids, and row by row the lengths of batches of the public
implementation (GSM8K-Aug, with a tokenizer of 640 tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from latent_reasoning.data.examples import (
    LatentExample,
    PlainExample,
    StudentExample,
)
from latent_reasoning.data.rows import DataError, read_rows
from latent_reasoning.data.sequences import SPECIAL_TOKENS, encode_prompts
from latent_reasoning.model.card import prompt_prefix
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.rl.prompts import RlPrompt, rl_prompts

EOS, WORDS, VOCABULARY = 1, 600, 640
"""Ids from 2 to below `WORDS` are words; the special tokens follow."""
STEPS = 6
ANSWER_WORDS = 3
"""Number of tokens of `` The answer is``; the colon follows, then the distilled token."""
TRAINED_PROMPTS, TRAINED_TOKENS = 32, 16
"""Number of prompts and longest completion of an RL step of the laptop experiment."""

# Tokens of each row's question, teacher's reasoning and answer; of each prompt, START included.
# fmt: off
SFT_LENGTHS = (
    (89, 20, 8), (107, 19, 7), (81, 12, 9), (47, 8, 7), (52, 9, 8), (154, 17, 7), (99, 7, 7),
    (92, 37, 7), (185, 29, 7), (94, 7, 7), (152, 20, 7), (133, 25, 7), (62, 8, 7), (115, 20, 7),
    (109, 19, 8), (93, 0, 7), (90, 13, 8), (103, 37, 8), (123, 23, 9), (89, 8, 8), (99, 44, 9),
    (128, 19, 7), (56, 7, 7), (313, 16, 7), (104, 24, 9), (64, 0, 8), (85, 24, 7), (132, 25, 8),
    (157, 28, 7), (53, 17, 8), (166, 17, 8), (193, 28, 9),
)
PROMPT_LENGTHS = (
    118, 44, 91, 54, 210, 82, 88, 146, 183, 90, 104, 105, 102, 103, 111, 194, 97, 77, 52, 104, 110,
    87, 105, 65, 66, 94, 104, 90, 86, 123, 59, 95,
)
# fmt: on


@dataclass(frozen=True)
class Shape:
    """Size of the model and of the batches: `rows` of SFT and evaluation, `grpo_prompts` of GRPO.

    `question` is the mean length of the questions; None: as in the lists above. `steps` is the
    number of latent steps of a student row; `sampled_steps` that of every sample, None: as the
    random model decides. Ids from `VOCABULARY` to `vocabulary` are never read.
    """

    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    rows: int = len(SFT_LENGTHS)
    grpo_prompts: int = 4
    group_size: int = 16
    steps: int = STEPS
    sampled_steps: int | None = None
    question: int | None = None
    rollout_tokens: int = 40
    vocabulary: int = VOCABULARY

    def sft_lengths(self) -> list[list[int]]:
        """Lengths of question, reasoning and answer of each row."""
        lengths = np.resize(SFT_LENGTHS, (self.rows, 3))
        lengths[:, 0] = self._scaled(np.array(SFT_LENGTHS)[:, 0], self.rows)
        return lengths.tolist()

    def prompt_lengths(self) -> list[int]:
        """Length of each prompt, START included."""
        return self._scaled(np.array(PROMPT_LENGTHS), max(self.rows, self.grpo_prompts)).tolist()

    def _scaled(self, lengths: np.ndarray, count: int) -> np.ndarray:
        """`count` of these lengths, over and over, scaled to the mean that `question` says."""
        scale = 1.0 if self.question is None else self.question / lengths.mean()
        return np.rint(scale * np.resize(lengths, count)).astype(int).clip(min=2)


@dataclass(frozen=True)
class Inputs:
    """A model and its data; prompts are ids without padding that end in START.

    `ending` follows the last latent step where their number is forced. Evaluation writes at most
    `evaluation_tokens` per prompt, for `batch_size` prompts at a time. RL samples as `shape` says.
    """

    model: LatentReasoner
    tokenizer: PreTrainedTokenizerBase
    sft: list[LatentExample]
    prompts: list[list[int]]
    ending: list[int]
    grpo: list[RlPrompt]
    shape: Shape
    batch_size: int
    evaluation_tokens: int = 32

    @property
    def decoding(self) -> dict[str, int]:
        """How evaluation decodes."""
        return {"max_new_tokens": self.evaluation_tokens, "eos_id": self.tokenizer.eos_token_id}

    def forced(self, steps: int) -> list[list[int]]:
        """The prompts with a forced number of latent steps."""
        run = [self.model.settings.continue_id] * steps
        return [prompt + run + self.ending for prompt in self.prompts]


def build_inputs(shape: Shape) -> Inputs:
    """A random model and generated batches.

    START cannot be sampled after STOP: a random model would think again at random, a trained one
    never does.
    """
    names = ("start_id", "end_id", "continue_id", "stop_id")
    ids = {name: WORDS + index for index, name in enumerate(names)}
    settings = LatentSettings(**ids, allow_rethinking=False)
    model, tokenizer = LatentReasoner(_base(shape), settings).eval(), _tokenizer()
    generate = np.random.default_rng(0)
    latent = [settings.start_id, *[settings.continue_id] * shape.steps, settings.stop_id]
    sft = [_example(*lengths, latent, generate) for lengths in shape.sft_lengths()]
    prompts = [
        [0, *_words(length - 2, generate), settings.start_id] for length in shape.prompt_lengths()
    ]
    return Inputs(
        model,
        tokenizer,
        sft,
        prompts[: shape.rows],
        ending=[settings.stop_id, *range(2, 2 + ANSWER_WORDS + 1)],
        grpo=[RlPrompt(p, tokenizer.decode(p), label="1") for p in prompts[: shape.grpo_prompts]],
        shape=shape,
        batch_size=shape.rows,
    )


def trained_inputs(folder: Path, file: Path, *, batch_size: int, max_new_tokens: int) -> Inputs:
    """A trained latent model and prepared rows, as evaluation and RL read them; there is no SFT.

    RL has the laptop experiment's shape. Raises `DataError` where the folder holds no latent model,
    or the rows cannot be used.
    """
    model, tokenizer = load(folder, device="cpu").eval(), load_tokenizer(folder)
    if model.settings is None:
        raise DataError(f"{folder}: not a latent model; name the folder of one of latent SFT or RL")
    rows, prefix = read_rows(file), prompt_prefix(folder)
    prompts, unthinking = (
        encode_prompts(rows, tokenizer, prefix=prefix, latent=True, forced_steps=steps)
        for steps in (None, 0)
    )
    return Inputs(
        model,
        tokenizer,
        sft=[],
        prompts=prompts,
        ending=unthinking[0][len(prompts[0]) :],
        grpo=rl_prompts(rows[:TRAINED_PROMPTS], tokenizer, prefix=prefix, max_prompt_tokens=None),
        shape=Shape(rollout_tokens=TRAINED_TOKENS),
        batch_size=batch_size,
        evaluation_tokens=max_new_tokens,
    )


def _base(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=0,
            eos_token_id=EOS,
        )
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of arbitrary words: rewards of generated batches only need a text."""
    words = {"<bos>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, WORDS)}}
    splitter = Tokenizer(models.WordLevel(words, unk_token="w2"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, **special)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


def _words(count: int, generate: np.random.Generator) -> list[int]:
    return generate.integers(EOS + 1, WORDS, count).tolist()


def _example(
    question: int, reasoning: int, answer: int, latent: list[int], generate: np.random.Generator
) -> LatentExample:
    """A row of random words with the given lengths, as teacher and as student."""
    asked, steps = [0, *_words(question - 1, generate)], _words(reasoning, generate)
    answered = [*_words(answer - 1, generate), EOS]

    def example(kind: type[PlainExample], run: list[int]) -> PlainExample:
        ids = np.array([*asked, *run, *answered], dtype=np.int32)
        target = question + len(run) + ANSWER_WORDS + 1
        return kind(ids, question, len(run), question, target)

    return LatentExample(example(PlainExample, steps), example(StudentExample, latent))
