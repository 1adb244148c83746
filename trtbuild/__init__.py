"""trtbuild: Hugging Face checkpoints to TensorRT engines, served by Triton, measured."""

__version__ = "0.1.0"
