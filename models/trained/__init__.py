"""Small trained models: what sparse and approximate attention is measured on, since random weights lose nothing."""
