"""Flow matching: path, time sampling, samplers."""
