"""An OpenAI-compatible HTTP front end over Triton's gRPC; a process of its own, with no tokenizer and no torch."""
