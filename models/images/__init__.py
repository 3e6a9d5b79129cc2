"""Image files: what their headers say, what decoding them takes, and their pixels."""
