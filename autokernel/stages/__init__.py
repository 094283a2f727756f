"""The stages of a run, one file each: what they submit, what they decide, what they record. `pipeline.py` strings them."""
