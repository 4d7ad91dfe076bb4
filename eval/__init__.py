"""Metrics and harnesses."""
