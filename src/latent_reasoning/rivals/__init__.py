"""Rival methods of reasoning in hidden states, on the same base, rows and evaluation."""
