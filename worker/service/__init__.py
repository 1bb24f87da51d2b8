"""How jobs come and verdicts go. Knows nothing of pixels."""
