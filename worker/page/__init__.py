"""A verdict as one HTML page: page.py says what is on it, template.html how it is laid out."""
