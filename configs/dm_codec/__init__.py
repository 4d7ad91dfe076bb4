"""Recipes of DM-Codec."""
