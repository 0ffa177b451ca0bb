"""Generated texts with questions: planted facts and small simulated worlds, from one vocabulary."""
