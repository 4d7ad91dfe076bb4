"""Recipes of VFM-VAE."""
