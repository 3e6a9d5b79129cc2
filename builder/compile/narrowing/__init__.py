"""A graph with fewer channels: `graph_file` reads and writes ONNX, `channels` knows what narrows together."""
