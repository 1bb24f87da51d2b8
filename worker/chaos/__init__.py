"""Kills the service's processes at random and proves that each job has one end."""
