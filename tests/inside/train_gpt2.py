"""A small GPT-2 that learns the laptop task's text, for `results/published/inside/gpt2`.

    python -m tests.inside.train_gpt2 CONFIG.. && \
        python -m latent_reasoning.inside --path results/gpt2/base/seed-0 --data ROWS --output out

It is the base model of an experiment, trained by the stage `base` as it is, with a GPT-2 of the
configured shape in the place of a Llama. CONFIG: `config/laptop.yaml tests/inside/gpt2.yaml`.
"""

from __future__ import annotations

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from latent_reasoning.base import scratch
from latent_reasoning.config import Architecture, load
from latent_reasoning.dag.digests import science_digest
from latent_reasoning.data.__main__ import main as prepare_data


def build_gpt2(shape: Architecture, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """A GPT-2 of the given shape with random weights: seed first."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=shape.hidden_size,
            n_inner=shape.intermediate_size,
            n_layer=shape.num_hidden_layers,
            n_head=shape.num_attention_heads,
            n_positions=shape.max_position_embeddings,
            initializer_range=shape.initializer_range,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main(files: list[str]) -> None:
    """Prepare the rows and train on them."""
    experiment = load(files)
    torch.set_num_threads(experiment.runtime.threads)
    prepare_data(["--config", *files])
    scratch.build_base = build_gpt2
    scratch.run(experiment, 0, science_digest(experiment, "base"))


if __name__ == "__main__":
    main(sys.argv[1:])
