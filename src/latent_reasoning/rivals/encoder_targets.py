"""Latent-SFT's targets from its first stage, trained before the model itself (docs/rivals.md).

Encoder and decoder begin as the model does. They are trained in three runs, as in the paper: the
encoder, the decoder, both. Then the mixtures of all rows are written once, to a file beside the
checkpoints: a training that resumes reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, Training
from latent_reasoning.data.collation import StepSampler, bucket_by_length
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.examples import PlainExample
from latent_reasoning.model.mixtures import Mixture
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rivals.latent_encoder import (
    CompressedBatch,
    CompressedRow,
    compressed_row,
    decoder_loss,
    decoder_states,
    encoded_mixtures,
)
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import autocast, resolve_precision, to_device
from latent_reasoning.runtime.files import atomic_file
from latent_reasoning.training.optimiser import build_optimizer, learning_rate
from latent_reasoning.training.run import TrainingRun

TARGETS_FILE = "mixtures.npz"
RUNS = (("encoder",), ("decoder",), ("encoder", "decoder"))
"""What each run of the first stage trains."""


@dataclass
class FirstStage:
    """Encoder, decoder, and the rows that they read."""

    encoder: LatentReasoner
    decoder: LatentReasoner
    rows: Sequence[CompressedRow]
    size: int
    pad_id: int

    @classmethod
    def of(
        cls,
        run: TrainingRun,
        model: LatentReasoner,
        tokenizer: PreTrainedTokenizerBase,
        plain: Sequence[PlainExample],
        texts: Sequence[str],
    ) -> FirstStage:
        """Copies of the model, and the rows with these reasoning `texts`.

        Raises `ConfigError` where the encoder would read past the base's last position.
        """
        settings = model.settings
        rows = [
            compressed_row(
                [*example.input_ids[: example.question_length].tolist(), settings.start_id],
                ids,
                [settings.stop_id],
                example.input_ids[example.question_length :].tolist(),
                rate=run.entry.latent_sft.rate,
                compress_id=settings.continue_id,
            )
            for example, ids in zip(plain, read_pieces(tokenizer, texts), strict=True)
        ]
        longest, limit = max(len(row.encoder_ids) for row in rows), model.position_limit
        if limit is not None and longest > limit:
            raise ConfigError(
                f"models.{run.name}.latent_sft.targets: encoder reads rows of up to {longest} "
                f"tokens, compress tokens included, past the {limit} positions of "
                f"{type(model.base).__name__}; raise latent_sft.rate, or set it to counts"
            )
        size = settings.mixture_size or model.base.config.vocab_size
        return cls(copy.deepcopy(model), copy.deepcopy(model), rows, size, tokenizer.pad_token_id)

    def batch(self, indices: Sequence[int]) -> CompressedBatch:
        """Some rows, on the device."""
        rows = [self.rows[index] for index in indices]
        batch = CompressedBatch.of(rows, self.encoder.settings.continue_id, self.pad_id)
        return to_device(batch, self.encoder.device)

    def mixtures(self, batch: CompressedBatch) -> Mixture:
        """Those of a batch's latent steps, row by row."""
        special = self.encoder.settings
        no_words = special.end_id, special.start_id, special.continue_id
        return encoded_mixtures(self.encoder, self.decoder, batch, self.size, no_words)

    def train(self, training: Training, parts: Sequence[str], seed: int) -> float:
        """One run, in which only `parts` are trained; returns its last loss."""
        models = {"encoder": self.encoder, "decoder": self.decoder}
        for name, model in models.items():
            model.train(name in parts)
        trained = nn.ModuleDict({name: models[name] for name in parts})
        optimizer, rate = build_optimizer(trained, training), learning_rate(training)
        sampler = StepSampler(len(self.rows), training.batch_size, seed)
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group["rate_factor"]
            batch = self.batch(sampler.indices(step))
            hidden = decoder_states(self.decoder, batch, self.mixtures(batch))
            loss, _ = decoder_loss(self.decoder, hidden, batch.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), training.max_grad_norm)
            optimizer.step()
            for model in models.values():
                model.zero_grad()
        return loss.item()

    @torch.no_grad()
    def targets(self, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Probabilities and ids (n, k) of every row's mixtures."""
        self.encoder.eval()
        made: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for indices in bucket_by_length([len(row.encoder_ids) for row in self.rows], batch_size):
            batch = self.batch(indices)
            mixtures, counts = self.mixtures(batch), batch.is_compress.sum(1).tolist()
            probabilities = mixtures.probabilities.float().cpu().split(counts)
            ids = mixtures.ids.int().cpu().split(counts)
            for index, shares, words in zip(indices, probabilities, ids, strict=True):
                made[index] = shares.numpy(), words.numpy()
        return [made[index] for index in range(len(self.rows))]


def encoder_targets(
    run: TrainingRun,
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    plain: Sequence[PlainExample],
    texts: Sequence[str],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Probabilities and ids (n, k) of the mixtures of rows with these reasoning `texts`; `plain`
    are the rows without. Made once, or read from the folder of checkpoints."""
    file = run.claim_checkpoint_folder() / TARGETS_FILE
    with run.processes.main_first():
        if not file.exists():
            _write(file, _learnt(run, FirstStage.of(run, model, tokenizer, plain, texts)))
    with np.load(file) as content:
        borders = np.cumsum(content["counts"])[:-1]
        parts = (np.split(content[key], borders) for key in ("probabilities", "ids"))
        return list(zip(*parts, strict=True))


def _learnt(run: TrainingRun, stage: FirstStage) -> list[tuple[np.ndarray, np.ndarray]]:
    """The targets after the three runs."""
    steps = run.entry.latent_sft.encoder_steps
    training = run.entry.training.model_copy(update={"steps": steps})
    with autocast(run.device, resolve_precision(run.experiment.runtime.precision, run.device)):
        for number, parts in enumerate(RUNS):
            purpose = seeds.ENCODER.format(model=run.name, run=number)
            loss = stage.train(training, parts, seeds.seed_for(run.seed, purpose))
            run.processes.print(f"{run.name}: trained {' and '.join(parts)}, last loss {loss:.3f}")
        return stage.targets(run.experiment.runtime.evaluation_batch_size)


def _write(file: Path, targets: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            probabilities=np.concatenate([shares for shares, _ in targets]),
            ids=np.concatenate([words for _, words in targets]),
            counts=np.array([len(words) for _, words in targets]),
        )
