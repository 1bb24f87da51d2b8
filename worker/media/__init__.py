"""The eyes: probe, decode, find. Knows nothing of jobs."""
