"""Linear attention: ``LinearAttention`` and its ops."""
