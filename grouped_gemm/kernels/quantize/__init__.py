"""Quantizers and the layouts that they write."""
