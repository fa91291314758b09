"""Keras runs on PyTorch in the tests' own process, and PyTorch on one core."""

from __future__ import annotations

import os

# Before anything imports Keras.
os.environ.setdefault("KERAS_BACKEND", "torch")
