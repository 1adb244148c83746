"""trtbuild: Hugging Face checkpoints to TensorRT engines that answer."""

__version__ = "0.1.0"
