"""The training loop, optimisers and schedules, EMA, checkpoints, tracking."""
