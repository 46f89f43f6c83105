"""What kernels share: launches, groups, scales, Hopper's instructions."""
