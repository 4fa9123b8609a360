"""What keeps a job alive and lets it end well: processes, files, checkpoints, requests to stop."""
