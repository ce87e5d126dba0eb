"""What a person starts: the command line, the training entry point, environment checks."""

if __name__ != "ringctx.launch":
    raise ImportError("this folder is ringctx.launch: write 'import ringctx.launch'")
