"""`ralf serve --http`: an upload page, and REST over the same queue."""
