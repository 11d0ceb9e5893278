"""The parts of a model: thin objects that hold parameters and call ops on workspace buffers.

No layer allocates or waits for the device while it runs, so a forward pass can be captured in a
CUDA graph.
"""
