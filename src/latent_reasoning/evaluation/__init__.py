"""Greedy evaluation of a model on a data set: verdicts, lengths, forced lengths, intervals."""
