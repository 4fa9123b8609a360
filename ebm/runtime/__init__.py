"""How a job lives: its processes, files, checkpoints, and ends."""
