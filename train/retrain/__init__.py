"""One command from data to a promoted model and its engines, step by step: `ralf retrain`."""
