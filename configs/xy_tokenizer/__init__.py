"""Recipes of XY-Tokenizer."""
