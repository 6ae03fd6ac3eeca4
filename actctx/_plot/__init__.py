"""The values of pictures; `actctx.plot` draws them."""
