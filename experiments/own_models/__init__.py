"""Real pretrained classifiers that Python packages ship, taken as they are and built as the manual says."""
