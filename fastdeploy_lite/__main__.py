"""`python -m fastdeploy_lite SUBCOMMAND ...` is `fastdeploy-lite SUBCOMMAND ...`."""

from fastdeploy_lite.entrypoints.cli.start import main

if __name__ == "__main__":
    main()
