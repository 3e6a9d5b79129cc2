"""TensorRT and TensorRT-RTX at run time; `engine` loads a plan, `slot` runs it."""
