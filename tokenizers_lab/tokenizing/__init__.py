"""Whole data sets to codes or latents: `toklab tokenize`."""
