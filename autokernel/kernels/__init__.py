"""GPU kernels of our own. Importing the package needs neither Triton nor a GPU; only launching one does."""
