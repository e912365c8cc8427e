"""Sequences of updates and of what disturbs them: steps, player, shrinking."""
