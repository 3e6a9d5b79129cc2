"""What is compiled: a student becomes ONNX, gets its precision, and is published as an engine package."""
