"""Recipes of LM-SPT."""
