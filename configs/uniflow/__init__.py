"""Recipes of UniFlow."""
