"""Population statistics of a whole model, and which statistics normalize."""
