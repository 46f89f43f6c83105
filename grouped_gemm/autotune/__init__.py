"""Measurements ahead of calls: profiles, timing, warmup."""
