"""What a capture hands back: the buffer, the tensors in it, its table and its typed views."""
