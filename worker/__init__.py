"""A job's walk from Redis to the verdict."""
