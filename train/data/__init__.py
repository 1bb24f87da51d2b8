"""From datasets on disk to batches: one index table, face crops, splits by identity."""
