"""Grouped GEMM kernels, their tiles and the search for tiles."""
