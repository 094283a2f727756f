"""What is kept of a run: the journal (the truth), its MLflow mirror, the plots and the report.

The only subpackage that imports MLflow, and it does so lazily: importing `autokernel.tracking` costs nothing.
"""
