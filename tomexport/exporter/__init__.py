"""From a checkpoint to a reduced module and its ONNX graph. Needs the `export` extra."""
