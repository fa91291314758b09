"""The gateway without its edges: knows no Starlette, httpx, pydantic, SQL or ONNX Runtime."""
