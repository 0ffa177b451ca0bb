"""Thin command-line entries of the training and benchmark jobs: ``python -m tools.NAME``."""
