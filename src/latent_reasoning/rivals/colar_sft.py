"""CoLaR SFT as a task of the training loop: rows as groups of words, one speed a step."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Colar, ConfigError, Data, TeacherForcedModel
from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.data.examples import IGNORED_LABEL, SEPARATORS
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import encode_plain_rows, encode_prompts, reasoning_text
from latent_reasoning.model.passes import Kind, kinds_of
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings, at_speed
from latent_reasoning.rivals.colar import Groups, colar_losses
from latent_reasoning.runtime import seeds
from latent_reasoning.sft.start import check_positions, checked_rows, latent_model
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import Planned
from latent_reasoning.training.text import Labels, TextTask

AUTO = "auto"


@dataclass(frozen=True)
class GroupedExample:
    """A row: its prompt, which ends in START, by the speed in it; the words of its reasoning; and
    what comes after STOP."""

    prompts: Mapping[str, np.ndarray]
    words: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        """Its length at speed 1."""
        longest = max(len(prompt) for prompt in self.prompts.values())
        return longest + len(self.words) + 1 + len(self.answer)


def grouped_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: Colar, data: Data
) -> list[GroupedExample]:
    """The rows with their prompts at every speed; rows above the token limit are dropped.

    Raises `DataError` where no row is left.
    """
    prefix = data.prompt.training
    texts = [reasoning_text(row, natural_language=data.natural_language) for row in rows]
    plain = encode_plain_rows(rows, tokenizer, prefix=prefix, reasonings=texts)
    speeds = [str(speed) for speed in settings.speeds] + [AUTO] * (settings.auto_share > 0)
    prompts = {
        speed: encode_prompts(
            rows, tokenizer, prefix=prefix, latent=True, suffix=at_speed(settings.speed_text, speed)
        )
        for speed in speeds
    }
    examples = []
    for place, example in enumerate(plain):
        own = {speed: np.array(ids[place], dtype=np.int32) for speed, ids in prompts.items()}
        borders = [example.question_length, example.question_length + example.reasoning_length]
        _, words, answer = np.split(example.input_ids, borders)
        examples.append(GroupedExample(own, words, answer))
    kept = [example for example in examples if len(example) + SEPARATORS <= data.max_tokens]
    if not kept:
        raise DataError(
            f"all {len(rows)} rows are longer than data.max_tokens: {data.max_tokens} allows"
        )
    return kept


def collate_groups(
    examples: Sequence[GroupedExample],
    speed: str,
    size: int,
    draws: Sequence[np.ndarray],
    special: LatentSettings,
    pad_id: int,
) -> Groups:
    """Examples with their words in groups of `size`, the last one of what is left.

    `draws` are uniform numbers in [0, 1), at least one a group: which of its words is foretold.
    """
    counts = [-(-len(example.words) // size) for example in examples]
    texts = [
        [*example.prompts[speed], *[special.continue_id] * count, special.stop_id, *example.answer]
        for example, count in zip(examples, counts, strict=True)
    ]
    input_ids, mask = pad_prompts(texts, pad_id)
    kinds = kinds_of(input_ids, mask.bool(), special)
    width, longest = input_ids.shape[1], max(len(example.words) for example in examples)
    words = torch.full((len(examples), longest), pad_id)
    columns = torch.full((len(examples), longest), width)
    labels, foretold = torch.full_like(input_ids, IGNORED_LABEL), []
    for row, (example, count, draw) in enumerate(zip(examples, counts, draws, strict=True)):
        length = len(example.words)
        first = width - len(example.answer) - 1 - count
        words[row, :length] = torch.from_numpy(example.words.astype(np.int64))
        columns[row, :length] = first + torch.arange(length) // size
        labels[row, first:] = input_ids[row, first:]
        for group in range(count):
            members = example.words[group * size : (group + 1) * size]
            word = int(members[int(draw[group] * len(members))])
            foretold.append((row, first + group - 1, word))
    return Groups(
        input_ids,
        mask,
        words,
        columns,
        size == 1,
        kinds,
        Labels.of(labels, kinds, special),
        (kinds == Kind.THINKING).nonzero(),
        torch.tensor(foretold, dtype=torch.long).view(-1, 3),
        torch.ones(()),
    )


@dataclass
class ColarTask(TextTask):
    """Learn latent steps of several words; the speed is drawn anew at each step."""

    examples: Sequence[GroupedExample]  # type: ignore[assignment]
    settings: Colar = field(kw_only=True)

    def speed_of(self, step: int) -> tuple[int, str]:
        """The size of the groups of a step, and the speed in its prompts."""
        generator = random.Random(self._seed(seeds.SPEED, step))
        size = generator.choice(self.settings.speeds)
        is_auto = generator.random() < self.settings.auto_share
        return size, AUTO if is_auto else str(size)

    def planned(self, micro_batch: Planned) -> None:
        """None: lengths change with the speed, so that too few batches have the same shape."""

    def program(  # type: ignore[override]  # another task's own batches
        self, inputs: Groups
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `loss`, on the model's device."""
        parts = colar_losses(self.model, inputs, self.settings)
        return sum(parts.values()), parts

    def _make(self, step: int) -> list[Planned]:
        size, speed = self.speed_of(step)
        key = self._seed(seeds.GROUP_LABELS, step)
        # All of the step: LAT and ENT are means over its thinking positions.
        made = [self._grouped(part, size, speed, key) for part in self.plan.micro_batches(step)]
        positions = sum(len(batch.inputs.thinking) for batch in made)
        weight = sum(batch.weight for batch in made)
        return [
            Planned(_scaled(batch.inputs, weight / positions / batch.weight), batch.weight)
            for batch in self.processes.share(made)
        ]

    def _seed(self, purpose: str, step: int) -> int:
        text = purpose.format(model=self.name, step=step)
        return seeds.seed_for(self.seed, text, self.plan.rollbacks)

    def _grouped(self, indices: list[int], size: int, speed: str, key: int) -> Planned:
        examples = [self.examples[index] for index in indices]
        # Which word is foretold depends on the row, not on the micro-batch it is in.
        draws = [
            np.random.default_rng((key, index)).random(len(example.words))
            for index, example in zip(indices, examples, strict=True)
        ]
        batch = collate_groups(examples, speed, size, draws, self.model.settings, self.pad_id)
        weight = len(batch.labels.rows) if self.by_tokens else len(indices)
        return Planned(batch, weight)


def _scaled(groups: Groups, factor: float) -> Groups:
    """With LAT and ENT counted by `factor` times their number of positions."""
    return replace(groups, latent_scale=torch.tensor(factor * len(groups.thinking)))


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, ColarTask]:
    """The model of `run` before training, its tokenizer and its task.

    Raises `ConfigError` where it has no Gaussian filter, `DataError` where no row is left.
    """
    entry: TeacherForcedModel = run.entry
    settings, data = entry.colar, run.experiment.data
    if entry.model.recurrent_filter != "gaussian":
        raise ConfigError(
            f"models.{run.name}.model.recurrent_filter: {entry.model.recurrent_filter}, but "
            "method: colar foretells latent inputs by the filter gaussian; set it"
        )
    if entry.model.stop_rule == "fixed":
        raise ConfigError(
            f"models.{run.name}.model.stop_rule: fixed, but method: colar takes as many latent "
            "steps as a row has groups of words; set it to marker or head"
        )
    model, tokenizer = latent_model(run, entry)
    model.change_settings(prompt_suffix=settings.speed_text, speed=settings.speed)
    examples = grouped_examples(checked_rows(run, tokenizer), tokenizer, settings, data)
    check_positions(model, max(map(len, examples)), data)
    longest = max(len(example.words) + 1 + len(example.answer) for example in examples)
    task = ColarTask(
        run.name,
        model,
        examples,
        entry.training,
        run.experiment.runtime,
        seed=run.seed,
        pad_id=tokenizer.pad_token_id,
        validate=run.validation(model, tokenizer, longest_completion=longest),
        processes=run.processes,
        settings=settings,
    )
    return model, tokenizer, task
