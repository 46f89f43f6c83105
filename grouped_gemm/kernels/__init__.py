"""Triton kernels, one file a job. Importing a module here imports Triton: backends do so when they launch."""
