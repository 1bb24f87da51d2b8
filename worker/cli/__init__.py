"""The command `ralf`: one parser, each command in the file that knows its business."""
