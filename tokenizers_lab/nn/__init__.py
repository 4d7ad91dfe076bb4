"""Transformer blocks and other layers that systems share."""
