"""The command line as `python -m actctx`."""

from actctx._cli.app import main

if __name__ == "__main__":
    main()
