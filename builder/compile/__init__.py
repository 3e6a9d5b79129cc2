"""From ONNX graphs to engine packages: compile, verify, measure, publish. Needs neither torch nor onnx."""
