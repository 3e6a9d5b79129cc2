"""From a student to ONNX graphs in each precision. Needs torch, ModelOpt and onnx."""
