"""Language models: text in, text out, written by continuous batching over plain ONNX Runtime."""
