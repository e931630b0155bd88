"""The record of a run: the journal is the truth; the summary, the pictures and MLflow are made from it."""
