"""Makes artifacts, offline: datasets on disk to a published model."""
