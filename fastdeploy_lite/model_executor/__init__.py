"""Everything that computes: native ops, layers, models, weights and the model runner."""

from fastdeploy_lite import device

# Paddle reads the plug-in's folder once, while it is imported, and every module below may be the
# first to import it.
device.prepare_environment()
