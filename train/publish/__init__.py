"""A run becomes a version of a model: calibrated, with its card; several versions become one."""
