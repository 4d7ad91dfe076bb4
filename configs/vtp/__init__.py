"""Recipes of VTP."""
