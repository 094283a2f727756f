"""Problem -> candidates: search spaces, seeds, the tuner, and the budget that hotspots share. Only `tuner` needs optuna."""
