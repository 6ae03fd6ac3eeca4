"""What pictures read and compute; `actctx.plot` draws them."""
