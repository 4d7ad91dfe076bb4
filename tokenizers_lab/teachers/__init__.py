"""Frozen networks whose features students follow."""
