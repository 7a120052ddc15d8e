"""The protocol LDP/1: messages, framing, tensors as bytes, shared memory."""
