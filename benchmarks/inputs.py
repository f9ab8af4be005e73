"""What the benchmark runs on: a model and batches, recorded ones where they are at hand.

A folder of conformance vectors has them in `bench/`. Without it the batches are generated with the
same lengths, row by row, and random ids and weights; what is computed has the same shapes. A
trained model brings its own rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
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
    IGNORED_LABEL,
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
from latent_reasoning.rl.groups import Prompt, rl_prompts

EOS = 1
WORDS = 600
"""Ids below are words of the recorded batches' tokenizer; the special tokens follow."""
STEPS = 6
ANSWER_WORDS = 3
""" `` The answer is`` has so many tokens; the colon follows, and the distilled token after it."""

# Lengths of the recorded batches, row by row: question, the teacher's reasoning, answer.
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


TRAINED_PROMPTS = 32
"""Prompts of an RL step of the laptop experiment."""


@dataclass(frozen=True)
class Shape:
    """Size of the model and of the batches: so many rows of latent SFT, evaluation and GRPO.

    `question` is the mean length of the questions, longer and shorter ones as in the recorded
    batches; None: as long as those. `steps` latent steps are learned, and taken where forced;
    `sampled_steps` are those of every sample, None: as the random model decides.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    rope_theta: float
    first_special_id: int = WORDS
    rows: int = len(SFT_LENGTHS)
    grpo_prompts: int = 4
    group_size: int = 16
    steps: int = STEPS
    sampled_steps: int | None = None
    question: int | None = None
    rollout_tokens: int = 40
    checkpoint: str | None = None
    sft_file: str | None = None

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of START, END, CONTINUE and STOP by setting."""
        names = ("start_id", "end_id", "continue_id", "stop_id")
        return {name: self.first_special_id + index for index, name in enumerate(names)}

    def sft_lengths(self) -> list[tuple[int, int, int]]:
        """Question, reasoning and answer of each row."""
        scale = self._scale([question for question, _, _ in SFT_LENGTHS])
        rows = itertools.islice(itertools.cycle(SFT_LENGTHS), self.rows)
        return [(max(2, round(scale * question)), *others) for question, *others in rows]

    def prompt_lengths(self) -> list[int]:
        """Tokens of each prompt, the one after the question included."""
        count, scale = max(self.rows, self.grpo_prompts), self._scale(PROMPT_LENGTHS)
        lengths = itertools.islice(itertools.cycle(PROMPT_LENGTHS), count)
        return [max(2, round(scale * length)) for length in lengths]

    def _scale(self, lengths: Sequence[int]) -> float:
        return 1.0 if self.question is None else self.question * len(lengths) / sum(lengths)


SHAPES = {
    "h128": Shape(
        hidden_size=128,
        intermediate_size=352,
        layers=4,
        heads=4,
        key_value_heads=2,
        vocabulary=640,
        rope_theta=500_000.0,
        checkpoint="ckpt_h128",
        sft_file="sft_batch32.npz",
    ),
    "smollm2": Shape(
        hidden_size=576,
        intermediate_size=1536,
        layers=30,
        heads=9,
        key_value_heads=3,
        vocabulary=49_280,
        rope_theta=100_000.0,
        first_special_id=49_152,
        rows=4,
        sft_file="smol_batch4_trimmed.npz",
    ),
}


@dataclass(frozen=True)
class Inputs:
    """A model and what it is run on; prompts are ids without padding.

    `adaptive` end in START; `forced` are the same with a latent run of `STEPS`, and what `ending`
    says after its last step. Evaluation writes at most `evaluation_tokens`, `batch_size` prompts at
    a time (None: all). RL samples `group_size` completions of at most `rollout_tokens`, all of
    `sampled_steps` latent steps (None: as the model decides).
    """

    model: LatentReasoner
    tokenizer: PreTrainedTokenizerBase
    sft: list[LatentExample]
    adaptive: list[list[int]]
    forced: list[list[int]]
    grpo: list[Prompt]
    evaluation_tokens: int = 32
    batch_size: int | None = None
    group_size: int = 16
    rollout_tokens: int = 40
    sampled_steps: int | None = None

    @property
    def ending(self) -> list[int]:
        """What follows the last latent step where their number is forced."""
        prompt = self.forced[0]
        return prompt[len(prompt) - prompt[::-1].index(self.model.settings.continue_id) :]


def build_inputs(shape: Shape, recorded: Path | None = None) -> Inputs:
    """The recorded batches and checkpoint of a folder as far as they fit, else generated ones.

    START cannot be sampled after STOP: a random model would think again at random, a trained one
    never does.
    """
    model, tokenizer = _model(shape, recorded)
    model.settings = dataclasses.replace(model.settings, allow_rethinking=False)
    generate = np.random.default_rng(0)
    sft = [_generated_example(shape, *row, generate) for row in shape.sft_lengths()]
    prompts = [_generated_prompt(shape, n, generate) for n in shape.prompt_lengths()]
    adaptive, grpo = prompts[: shape.rows], prompts[: shape.grpo_prompts]
    forced = [prompt + _forced_end(shape) for prompt in adaptive]
    if recorded is not None:
        sft = _recorded_examples(recorded / shape.sft_file, model.settings)
        if shape.checkpoint:
            adaptive = _recorded_prompts(recorded / "eval_prompts_adaptive.npz")
            forced = _recorded_prompts(recorded / "eval_prompts_override6.npz")
            grpo = _distinct(_recorded_prompts(recorded / "grpo_prompts.npz"))
    return Inputs(
        model,
        tokenizer,
        sft,
        adaptive,
        forced,
        [Prompt(ids, tokenizer.decode(ids), label="1") for ids in grpo],
        group_size=shape.group_size,
        rollout_tokens=shape.rollout_tokens,
        sampled_steps=shape.sampled_steps,
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

    def prompts(forced_steps: int | None) -> list[list[int]]:
        return encode_prompts(
            rows, tokenizer, prefix=prefix, latent=True, forced_steps=forced_steps
        )

    first = rows[:TRAINED_PROMPTS]
    return Inputs(
        model,
        tokenizer,
        sft=[],
        adaptive=prompts(None),
        forced=prompts(STEPS),
        grpo=rl_prompts(first, tokenizer, prefix=prefix, max_prompt_tokens=None),
        evaluation_tokens=max_new_tokens,
        batch_size=batch_size,
        rollout_tokens=16,
    )


def _model(shape: Shape, recorded: Path | None) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    if recorded is not None and shape.checkpoint:
        folder = recorded / shape.checkpoint
        return load(folder, device="cpu"), load_tokenizer(folder)
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=0,
            eos_token_id=EOS,
        )
    )
    return LatentReasoner(base, LatentSettings(**shape.special_ids)).eval(), _tokenizer()


def _tokenizer() -> PreTrainedTokenizerFast:
    """Any words will do: rewards of generated batches only need a text."""
    words = {"<bos>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, WORDS)}}
    splitter = Tokenizer(models.WordLevel(words, unk_token="w2"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitter,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
    )
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


# --------------------------------------------------------------------------------------- generated


def _words(count: int, generate: np.random.Generator) -> list[int]:
    return generate.integers(EOS + 1, WORDS, count).tolist()


def _latent_run(shape: Shape) -> list[int]:
    ids = shape.special_ids
    return [ids["start_id"], *[ids["continue_id"]] * shape.steps, ids["stop_id"]]


def _forced_end(shape: Shape) -> list[int]:
    """What follows START where the number of steps is forced: the run, and the answer's words."""
    return [*_latent_run(shape)[1:], *range(2, 2 + ANSWER_WORDS + 1)]


def _generated_prompt(shape: Shape, length: int, generate: np.random.Generator) -> list[int]:
    return [0, *_words(length - 2, generate), shape.special_ids["start_id"]]


def _generated_example(
    shape: Shape, question: int, reasoning: int, answer: int, generate: np.random.Generator
) -> LatentExample:
    """Random words in a row of the given lengths, as teacher and as student."""
    question_ids = [0, *_words(question - 1, generate)]
    steps, latent = _words(reasoning, generate), _latent_run(shape)
    answer_ids = [*_words(answer - 1, generate), EOS]

    def example(kind: type[PlainExample], run: list[int]) -> PlainExample:
        ids = np.array([*question_ids, *run, *answer_ids], dtype=np.int32)
        target = question + len(run) + ANSWER_WORDS + 1
        return kind(ids, question, len(run), question, target)

    return LatentExample(example(PlainExample, steps), example(StudentExample, latent))


# ---------------------------------------------------------------------------------------- recorded


def _recorded_prompts(file: Path) -> list[list[int]]:
    with np.load(file) as arrays:
        rows = zip(arrays["input_ids"], arrays["attention_mask"].astype(bool), strict=True)
        return [ids[read].tolist() for ids, read in rows]


def _distinct(prompts: list[list[int]]) -> list[list[int]]:
    return [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]


def _recorded_examples(file: Path, settings: LatentSettings) -> list[LatentExample]:
    """The rows of a recorded padded batch; raises `ValueError` where they are of another kind."""
    with np.load(file) as stored:
        arrays = dict(stored)
    examples = []
    for row in range(len(arrays["input_ids"])):
        values = {name: array[row] for name, array in arrays.items()}
        if settings.start_id not in values["latent_input_ids"]:
            raise ValueError(f"{file.name}: row {row} has other special tokens than the model")
        teacher = _recorded_example(PlainExample, values, "")
        examples.append(
            LatentExample(teacher, _recorded_example(StudentExample, values, "latent_"))
        )
    return examples


def _recorded_example(
    kind: type[PlainExample], values: dict[str, np.ndarray], before: str
) -> PlainExample:
    mask = values[f"{before}attention_mask"].astype(bool)
    labels = values[f"{before}labels"][mask]
    reasoning = values[f"{before}reasoning_map"][mask]
    first_label = int((labels != IGNORED_LABEL).argmax())
    return kind(
        input_ids=values[f"{before}input_ids"][mask].astype(np.int32),
        # A teacher without reasoning begins to learn where the question ends.
        question_length=int(reasoning.argmax()) if reasoning.any() else first_label,
        reasoning_length=int(reasoning.sum()),
        first_label=first_label,
        target_position=int(values[f"{before}target_token_map"][mask].argmax()),
    )
