"""Conformance and benchmark suite for weight sync into vLLM."""

__version__ = "0.1.0"
