"""The drill: a small real training, disturbed on purpose, compared with the same training left alone."""
