"""Benchmarks of the worker: scan, finder, decoders, whole clips, queue."""
