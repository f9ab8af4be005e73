"""Other published methods of latent reasoning, trained and decoded on equal terms."""
