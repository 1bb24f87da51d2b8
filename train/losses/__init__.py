"""One loss a file, one file a detector."""
