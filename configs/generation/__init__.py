"""Recipes of the generators of latents."""
