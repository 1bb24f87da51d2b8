"""The networks by name; see build()."""
