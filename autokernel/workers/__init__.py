"""Where jobs run: one killable child process per worker, local or on a Ray cluster."""
