"""What a capture returns: the buffer, its tensors, its table and its typed views."""
