"""Generators of images' latents: the judges of image tokenizers. One folder each; what they share stands here."""
