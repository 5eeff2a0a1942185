"""Learn pre-ranking models from logs and write them as bundles of ONNX towers."""
