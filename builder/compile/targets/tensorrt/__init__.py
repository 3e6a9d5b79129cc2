"""Compile a graph for NVIDIA GPUs: TensorRT 10.3 to 11, and TensorRT-RTX, on one strongly typed path."""
