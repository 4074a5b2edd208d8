"""Generated tasks: documents with questions whose answers are known."""
