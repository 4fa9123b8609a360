"""A trained run opened for use, and pictures of samples."""
