"""The parts of the HTML page that ralf.worker.report puts together; text in, HTML out."""
