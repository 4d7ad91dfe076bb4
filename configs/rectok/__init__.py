"""Recipes of RecTok."""
