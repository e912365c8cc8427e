"""Loading into a live model, and reading what it computes with."""
