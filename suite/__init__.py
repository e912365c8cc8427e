"""Conformance and benchmark suite for weight sync into vLLM."""

from pathlib import Path

__version__ = "0.1.0"
ROOT = Path(__file__).resolve().parents[1]  # of the checkout
