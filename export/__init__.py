"""From a LLaVA checkpoint folder to a verified ONNX bundle, and the torch-free contract by which a bundle is read."""
