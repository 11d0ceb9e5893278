"""Who runs the steps of the engine core: this process, or several that share each layer."""
