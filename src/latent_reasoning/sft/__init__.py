"""Supervised fine-tuning: on text (chain of thought, or the answer alone) and latent."""
