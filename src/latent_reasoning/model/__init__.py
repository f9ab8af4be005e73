"""The latent reasoner around any Hugging Face causal language model, and its checkpoints."""

from latent_reasoning.model.folder import load

__all__ = ["load"]
