"""Generation: greedy ids, stop probabilities, lengths, verdicts and metrics (`generation/`, `bench/`)."""
