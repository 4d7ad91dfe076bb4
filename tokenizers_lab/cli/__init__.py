"""`toklab`: one small module a command; heavy imports stay inside the command."""
