"""`python -m onnx_autoglm` is the same program as `onnx-autoglm`."""

from __future__ import annotations

from onnx_autoglm.cli import main

if __name__ == "__main__":
    main()
