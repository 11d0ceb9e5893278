"""The command line `fastdeploy-lite`."""
