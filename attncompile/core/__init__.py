"""Values that every stage exchanges. Nothing here imports any other part of attncompile."""
