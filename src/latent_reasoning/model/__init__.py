"""The latent reasoner around any Hugging Face causal language model, and its checkpoints."""

from latent_reasoning.model.checkpoints import load

__all__ = ["load"]
