"""The command `ralf`: one parser, each command in a file of its own subject."""
