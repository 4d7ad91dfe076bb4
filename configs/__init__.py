"""Recipes: <system>/<variant>.yaml, packaged so that an installed wheel finds them by name."""
