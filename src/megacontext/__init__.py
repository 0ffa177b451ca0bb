"""MegaContext: a memory without end for any frozen causal language model."""

__version__ = "0.1.0"
