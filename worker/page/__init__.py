"""The parts of the HTML page that worker.report puts together; text in, HTML out."""
