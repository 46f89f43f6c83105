"""Kernels of an MoE layer around its GEMMs."""
