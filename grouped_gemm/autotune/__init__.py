"""What is measured ahead of calls: profile, timing, warmup."""
