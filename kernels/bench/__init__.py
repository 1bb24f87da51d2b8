"""Benchmarks of kernels and engines: each way beside the papers' way, in one run and one record."""
