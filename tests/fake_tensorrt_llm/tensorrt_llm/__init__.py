"""Stands in for TensorRT-LLM 1.2.1 where it cannot be installed; see commands/build.py."""
