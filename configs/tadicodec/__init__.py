"""Recipes of TaDiCodec."""
