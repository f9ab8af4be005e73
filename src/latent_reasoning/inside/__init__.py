"""Seeing inside the chain: what the latent steps carry, where in depth, and in what space."""
