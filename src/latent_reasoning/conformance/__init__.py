"""Replays recorded inputs and outputs of the paper's public code through this project's own paths.

python -m latent_reasoning.conformance DIR
"""
