"""From inputs to rows on disk: read, choose, run, write, resume, and add sites."""
