"""Here so that the helpers beside it, such as pairs.py, can be imported by tests of every folder."""
