"""From ONNX graphs to engine packages: compile, verify, measure, publish. Needs none of torch and onnx."""
