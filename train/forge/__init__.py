"""Makes forgeries from real faces, and damages both as uploads are damaged."""
