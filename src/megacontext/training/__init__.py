"""Data generators, objectives and training loops."""
