"""Bottlenecks: diagonal Gaussian, codebooks."""
