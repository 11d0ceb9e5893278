"""What runs beside a device: the model runner and the budget of its KV cache.

`worker.output` holds result containers under upstream's import path.
"""
